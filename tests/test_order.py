"""The order of the examples: a bijection in each epoch, shared out without overlap, at a cost that does not grow."""

import math
import re
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletrain import InputError
from scaletrain.order import Given, Sequential, Shuffled, Weighted, checked, digest_of
from scaletrain.permutation import seed_for
from scaletrain.share import Share, micro_batch_count, split

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10**6)


@settings(max_examples=2000, deadline=None)
@given(n=sizes, seed=seeds, epoch=epochs)
def test_an_epoch_shows_every_example_exactly_once(n, seed, epoch):
    shown = Shuffled(n, seed)(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(shown), np.arange(n))


@settings(max_examples=500, deadline=None)
@given(n=sizes, seed=seeds, batch_size=st.integers(1, 300), first=st.integers(0, 10**7), data=st.data())
def test_the_shares_of_the_processes_partition_each_step(n, seed, batch_size, first, data):
    world_size = data.draw(st.integers(1, min(batch_size, 40)))
    order = Shuffled(n, seed)
    blocks = [Share(order, batch_size, rank, world_size).block(first, 3) for rank in range(world_size)]
    stream = np.arange(first, first + 3 * batch_size).reshape(3, batch_size)
    assert np.array_equal(np.concatenate([positions for positions, _ in blocks], axis=1), stream)
    assert np.array_equal(np.concatenate([indices for _, indices in blocks], axis=1), order(stream))
    share_sizes = [positions.shape[1] for positions, _ in blocks]
    assert max(share_sizes) - min(share_sizes) <= 1
    assert min(share_sizes) >= 1


@settings(max_examples=1000, deadline=None)
@given(
    n=st.integers(1, 2**62), seed=seeds, places=st.lists(st.integers(0, 2**62), min_size=2, max_size=50, unique=True)
)
def test_huge_epochs_stay_in_range_and_never_show_an_example_twice(n, seed, places):
    places = np.array(sorted({place % n for place in places}))
    shown = Shuffled(n, seed)(places)
    assert shown.min() >= 0
    assert shown.max() < n
    assert len(set(shown.tolist())) == len(places)


@settings(max_examples=1000, deadline=None)
@given(n=sizes, seed=seeds, positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=100))
def test_the_order_is_a_function_of_the_position_alone(n, seed, positions):
    order = Shuffled(n, seed)
    together = order(np.array(positions))
    alone = [int(order(np.array([position]))[0]) for position in positions]
    assert together.tolist() == alone


@settings(max_examples=1000, deadline=None)
@given(batch_size=st.integers(1, 500), micro=st.integers(1, 600), data=st.data())
def test_micro_batches_hold_a_share_and_no_more_than_the_limit(batch_size, micro, data):
    world_size = data.draw(st.integers(1, batch_size))
    count = micro_batch_count(batch_size, world_size, micro)
    for share in {len(range(batch_size)[part]) for part in split(batch_size, world_size)}:
        parts = split(share, count)
        assert [i for part in parts for i in range(share)[part]] == list(range(share))
        assert max(part.stop - part.start for part in parts) <= micro


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_permutation_of_a_small_epoch_is_equally_likely(n):
    draws = 600 * math.factorial(n)
    shown = Shuffled(n, seed=7)(np.arange(n * draws)).reshape(draws, n)
    _, counts = np.unique(shown, axis=0, return_counts=True)
    cells = math.factorial(n)
    assert len(counts) == cells
    chi_square = ((counts - 600) ** 2 / 600).sum()
    assert abs(chi_square - (cells - 1)) < 5 * math.sqrt(2 * cells)  # five standard deviations


@pytest.mark.parametrize("n", [50, 64, 1000, 4097])
def test_places_neighbours_epochs_and_seeds_are_independent(n):
    epochs = 100_000 // n + 40
    shown = Shuffled(n, seed=3)(np.arange(n * epochs)).reshape(epochs, n)
    columns = (shown - (n - 1) / 2) / math.sqrt((n * n - 1) / 12)  # mean 0, variance 1
    noise = 5 / math.sqrt(columns.size)
    place = np.linspace(-1, 1, n) * math.sqrt(3)
    assert abs((columns * place).mean()) < noise  # where it lies says nothing about when it is shown
    assert abs((columns[:, 1:] * columns[:, :-1]).mean()) < noise + 1 / n  # nor do neighbours
    assert abs((columns[1:] * columns[:-1]).mean()) < noise  # nor does the epoch before
    other = Shuffled(n, seed=4)(np.arange(n * epochs)).reshape(epochs, n)
    assert abs((columns * (other - (n - 1) / 2)).mean()) / math.sqrt((n * n - 1) / 12) < noise


def test_the_cost_does_not_grow_with_the_number_of_examples_or_the_position():
    def seconds(n):
        share = Share(Shuffled(n, 0), 64)
        best = math.inf
        for _ in range(30):
            start = time.perf_counter()
            share.block(9 * n // 10, 64)
            best = min(best, time.perf_counter() - start)
        return best

    small, huge = seconds(10**3), seconds(10**12)
    assert huge < 3 * small  # 1.0-1.3 measured; randperm would be 10**9 times slower


def test_the_memory_does_not_grow_with_the_number_of_examples_or_the_position():
    def peak_bytes(n):
        tracemalloc.start()
        Share(Shuffled(n, 0), 64).block(9 * n // 10, 128)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(10**12) < 1.5 * peak_bytes(10**4) < 1.5e6


@pytest.mark.parametrize(
    "order",
    [Sequential(10), Given(np.array([3, 1, 4, 1, 5])), Weighted(np.arange(10.0), 5)],
    ids=lambda o: type(o).__name__,
)
def test_every_order_is_a_function_of_the_position_alone(order):
    stream = order(np.arange(1000))
    assert stream.dtype == np.int64
    assert [int(order(np.array([p]))[0]) for p in (0, 17, 999)] == stream[[0, 17, 999]].tolist()


def test_sequential_and_given_orders_repeat():
    assert Sequential(4)(np.arange(6)).tolist() == [0, 1, 2, 3, 0, 1]
    assert Given(np.array([7, 9]))(np.arange(5)).tolist() == [7, 9, 7, 9, 7]


def test_weighted_draws_follow_the_weights():
    weights = np.array([0.0, 1.0, 2.0, 5.0])
    counts = np.bincount(Weighted(weights, seed=1)(np.arange(80_000)), minlength=4)
    assert counts[0] == 0
    assert np.allclose(counts / 80_000, weights / 8, atol=0.01)
    assert not np.array_equal(Weighted(weights, 1)(np.arange(99)), Weighted(weights, 2)(np.arange(99)))


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(InputError, match="finite numbers >= 0"):
        Weighted(np.array(weights))


def test_seeds_differ_for_different_keys_and_stay_for_equal_ones():
    keys = [(a, b) for a in range(100) for b in range(100)]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    assert len({seed_for(*key) & 0xFFFFFFFF for key in keys}) > len(keys) - 3  # torch's CPU generator takes 32 bits
    assert seed_for(1, 2, 3) == seed_for(1, 2, 3) < 2**64


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([], "Given has float64 of shape (0,); it takes one row of example numbers"),
        ([1.0, 2.0], "Given has float64 of shape (2,)"),
        (
            [True, False],
            "Given has bool of shape (2,); it takes one row of example numbers; of a mask give np",
        ),
        ([[1, 2]], "Given has int64 of shape (1, 2)"),
        (3, "Given has int64 of shape ()"),
    ],
)
def test_what_is_no_row_of_example_numbers_is_refused(indices, said):
    with pytest.raises(InputError, match=re.escape(said)):
        Given(indices)
    assert Given([1, 2, 3])(np.arange(4)).tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("kind", [Sequential, Shuffled])
@pytest.mark.parametrize("n", [0, -1, 3.0])
def test_an_order_of_no_examples_is_refused(kind, n):
    with pytest.raises(InputError, match=f"{kind.__name__} has n {n}; it is the number of examples, at least 1"):
        kind(n)


class Own:
    """An order of the user's own that returns what it is told to."""

    def __init__(self, n, answer):
        self.n, self.answer = n, answer

    def __call__(self, positions):
        return self.answer(positions)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (Shuffled(41), "the order Shuffled is of 41 examples, but there are 40"),
        (Sequential(39), "the order Sequential is of 39 examples"),
        (Weighted(np.ones(41)), "the order Weighted is of 41 examples"),
        (Given(np.arange(0)), "the order has 0 examples; it needs at least one"),
        (Given([0, 40]), "the order asks for example 40, but there are 40: 0 to 39"),
        (Given([0, -1]), "the order asks for example -1, but there are 40"),
        (lambda positions: positions, "order is a function; it must have n, the examples of an epoch, and map"),
        ([1, 2, 3], "order is a list; it must have n"),
        (Own(40.0, None), "order is a Own; it must have n"),
    ],
)
def test_an_order_that_is_not_of_these_examples_is_refused(order, said):
    with pytest.raises(InputError, match=re.escape(said)):
        checked(order, 40)


def test_each_block_of_an_order_of_the_users_own_is_checked():
    assert checked(Own(9, lambda p: p % 7), 7)(np.arange(9)).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    for answer, said in (
        (lambda p: p, "the order asks for example 47, but there are 40: 0 to 39"),
        (lambda p: p - 1, "the order asks for example -1"),
        (lambda p: p / 2, "the order returns float64 of shape (6, 8) for positions of shape (6, 8)"),
        (lambda p: p.ravel() % 40, "the order returns int64 of shape (48,) for positions of shape (6, 8)"),
    ):
        share = Share(checked(Own(40, answer), 40), 8)
        with pytest.raises(InputError, match=re.escape(said)):
            share.block(0, 6)


def test_an_orders_digest_changes_with_anything_in_it():
    indices, weights = np.arange(100_000), np.ones(100_000)
    swapped, heavier = indices.copy(), weights.copy()
    swapped[[5_000, 60_000]] = swapped[[60_000, 5_000]]
    heavier[50_000] = 50
    orders = [
        Given(indices), Given(swapped), Weighted(weights), Weighted(heavier), Weighted(weights, 1), Sequential(100_000),
        Shuffled(100_000), Shuffled(100_000, 1), Own(100_000, lambda p: p % 7), Own(100_000, lambda p: p % 5),
    ]  # fmt: skip
    assert len({digest_of(order) for order in orders}) == len(orders)
    assert digest_of(Given(indices.astype(np.int32))) == digest_of(Given(indices.tolist()))
    assert digest_of(checked(Own(9, lambda p: p % 7), 7)) == digest_of(Own(9, lambda p: p % 7))

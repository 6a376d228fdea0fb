"""How ranks agree: texts, errors and wishes arrive at all of them."""

import pytest
import torch.distributed as dist

from scaletrain import InputError
from scaletrain.agreement import NO_WISH, Wish, Wishes, first_then_others, gather_texts, together
from scaletrain.devices import set_up


@pytest.mark.world_size(3)
def test_texts_and_errors_of_one_rank_reach_all_and_rank_0_goes_first(shared_path):
    control, rank = set_up().control, dist.get_rank()
    assert gather_texts(["", "füße → 足", "x" * 100_000][rank], control) == ["", "füße → 足", "x" * 100_000]
    assert gather_texts("", control) == ["", "", ""]

    def fail_on_2():
        if rank == 2:
            raise OSError("the disk of rank 2 is full")
        return rank

    with pytest.raises(InputError, match="the disk of rank 2 is full"):
        together(fail_on_2, control)
    assert together(lambda: rank, control) == rank

    def am_i_first():
        first = not (shared_path / "cache").exists()
        (shared_path / "cache").touch()
        return first

    assert first_then_others(am_i_first, control) == (rank == 0)


STOP = Wish(stop=2, save=1)


def exchange(wishes, mine):
    """What a step does: hear what was asked for before, and ask."""
    granted = wishes.read()
    wishes.send(mine)
    return granted


@pytest.mark.world_size(3)
def test_wishes_arrive_one_step_late_on_every_rank():
    wishes = Wishes(set_up().control)
    heard = []
    for step in range(6):
        mine = {0: Wish(save=1), 1: Wish(stop=2)}.get(dist.get_rank(), NO_WISH) if step == 3 else NO_WISH
        heard.append(exchange(wishes, mine))
    assert wishes.drain() == NO_WISH
    assert heard == [NO_WISH, NO_WISH, NO_WISH, NO_WISH, STOP, NO_WISH]


def test_with_one_process_wishes_arrive_at_the_same_step():
    wishes = Wishes(None)
    heard = [exchange(wishes, STOP if step == 3 else NO_WISH) for step in range(6)]
    assert heard == [NO_WISH, NO_WISH, NO_WISH, NO_WISH, STOP, NO_WISH]


@pytest.mark.world_size(2)
def test_what_is_heard_early_is_handed_out_by_the_next_read():
    wishes = Wishes(set_up().control)
    wishes.send(Wish(save=1) if dist.get_rank() == 1 else NO_WISH)
    assert wishes.drain() == wishes.drain() == Wish(save=1)
    wishes.hold(Wish(stop=1))
    assert wishes.read() == Wish(stop=1, save=1)
    assert wishes.read() == NO_WISH


def test_with_one_process_errors_become_input_errors_as_well():
    def fail():
        raise FileNotFoundError(2, "No such file or directory", "train.csv")

    with pytest.raises(InputError, match=r"No such file or directory: 'train\.csv'"):
        first_then_others(fail, None)

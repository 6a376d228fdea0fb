"""Streams: shared out without overlap, shuffled in windows, resumed exactly on the same processes."""

import os
import random
import signal
import sys
from dataclasses import replace
from itertools import chain

import datasets
import pytest
import tiny
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from launching import TORCHRUN, launch, script
from PIL import Image
from test_checkpoints import ends_with, left_after

from scaletrain import Data, InputError, main, start, train
from scaletrain.content import fingerprint
from scaletrain.data import is_stream
from scaletrain.devices import set_up
from scaletrain.division import EveryNth, _alike, _sample, shared_out
from scaletrain.streams import Stream

ROWS = [
    {"x": x.tolist(), "y": int(y), "row": int(row)}
    for x, y, row in zip(*(tiny.table()[name] for name in ("x", "y", "row")), strict=True)
]


class Numbers(torch.utils.data.IterableDataset):
    """A stream that knows nothing of its place."""

    def __init__(self, n=30):
        self.n = n

    def __iter__(self):
        for i in range(self.n):
            yield {"i": i, "noise": torch.rand(()).item()}


def hugging_face(n=30):
    return datasets.Dataset.from_dict({"i": range(n)}).to_iterable_dataset(num_shards=3)


def taken(stream, number):
    iterator = iter(stream)
    return [next(iterator) for _ in range(number)]


@pytest.mark.parametrize("make", [Numbers, hugging_face])
@pytest.mark.parametrize("window", [1, 7, 100])
def test_every_pass_hands_out_every_example_once_and_windows_are_shuffled(make, window):
    seen = [example["i"] for example in taken(Stream(make(), window, seed=3), 90)]
    for k in range(3):
        assert sorted(seen[30 * k : 30 * k + 30]) == list(range(30))
    if window == 1:
        assert seen[:30] == list(range(30))  # datasets itself takes the shards of later passes in another order
    else:
        assert seen[:30] != seen[30:60] != sorted(seen[30:60])
    if window == 7:
        assert all(sorted(seen[i : i + 7]) == list(range(i, i + 7)) for i in range(0, 28, 7))


@pytest.mark.parametrize("make", [Numbers, hugging_face])
@pytest.mark.parametrize("window", [1, 7])
def test_from_every_place_a_stream_goes_on_exactly(make, window):
    whole = taken(Stream(make(), window, seed=3), 75)
    for place in range(75):
        first = Stream(make(), window, seed=3)
        taken(first, place)
        again = Stream(make(), window, seed=3)
        again.state = first.state
        assert taken(again, 75 - place) == whole[place:]


def stream_recipe(rows=ROWS, **more):
    def data(cfg):
        train = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=6)
        return Data(train, tiny.table(53, seed=1), shuffle_buffer=20)

    def collate(examples):
        return {
            "x": torch.stack([torch.as_tensor(e["x"], dtype=torch.float64) for e in examples]),
            "y": torch.tensor([int(e["y"]) for e in examples]),
        }

    return replace(tiny.recipe, data=data, collate=collate, **more)


def bits(folder):
    return [(folder / "run" / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_a_stream_goes_on_with_the_same_bits(workers, tmp_path):
    recipe = replace(stream_recipe(), data=lambda cfg: Data(stream_recipe().data(cfg).train, None, shuffle_buffer=20))
    argv = ["--workers", str(workers), "--log-every", "1"]
    main(recipe, ["--max-steps", "20", *argv, "--out", str(tmp_path / "whole/run")])
    for step in (1, 5, 7, 13):
        home = tmp_path / str(step)
        main(
            recipe,
            [
                "--max-steps",
                "20",
                *argv,
                "--checkpoint-every",
                str(step),
                "--keep-last",
                "99",
                "--out",
                str(home / "run"),
            ],
        )
        left_after(home / "run", step)
        main(
            recipe, ["--max-steps", "20", "--workers", str(1 - workers), "--log-every", "1", "--out", str(home / "run")]
        )
        assert bits(home) == bits(tmp_path / "whole")


def test_a_stream_needs_max_steps_and_no_order(tmp_path, capsys):
    recipe = replace(stream_recipe(), data=lambda cfg: Data(hugging_face()))
    assert "a stream, which has no length; say --max-steps" in ends_with(2, capsys, lambda: main(recipe, []))
    argv = ["--max-steps", "3", "--skip-bad", "1"]
    said = ends_with(2, capsys, lambda: main(recipe, argv))
    assert "--skip-bad takes another example of the order, and a stream has none; leave it out" in said


@pytest.mark.parametrize(
    "then",
    [
        lambda stream: stream,
        lambda stream: stream.map(lambda row: row),
        lambda stream: stream.filter(lambda row: True).take(20),
        lambda stream: stream.select_columns(["i"]).with_format("torch"),
        lambda stream: datasets.concatenate_datasets([hugging_face(), stream]).skip(1),
        lambda stream: datasets.interleave_datasets([hugging_face(), stream.map(lambda row: row)]),
    ],
)
def test_a_stream_that_shuffles_in_a_buffer_of_its_own_is_refused_whatever_came_after(then):
    shared_out(then(hugging_face()), 0, 1, None)
    with pytest.raises(InputError, match="shuffled in a buffer of its own"):
        shared_out(then(hugging_face().shuffle(seed=1, buffer_size=5)), 0, 1, None)


def test_an_empty_stream_is_said():
    with pytest.raises(InputError, match="the stream of training examples is empty"):
        taken(Stream(Numbers(0), 5, seed=1), 1)


def test_what_has_a_length_is_no_stream():
    assert is_stream(Numbers())
    assert is_stream(hugging_face())
    assert not is_stream(datasets.Dataset.from_dict({"i": range(3)}))
    assert not is_stream([1, 2])


def gathered(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class OwnRank(Numbers):
    """A stream that divides itself by the rank."""

    def __iter__(self):
        for i in range(dist.get_rank(), self.n, dist.get_world_size()):
            yield {"i": i}


class Shuffling(Numbers):
    """A stream that shuffles its files when a pass begins."""

    def __iter__(self):
        order = list(range(self.n))
        random.shuffle(order)
        for i in order:
            yield {"i": i, "noise": torch.rand(()).item()}


@pytest.mark.parametrize("window", [1, 7])
def test_a_stream_that_shuffles_when_a_pass_begins_goes_on_exactly_too(window):
    whole = taken(Stream(Shuffling(), window, seed=3), 75)
    for place in (0, 1, 7, 29, 30, 31, 60, 74):
        first = Stream(Shuffling(), window, seed=3)
        taken(first, place)
        again = Stream(Shuffling(), window, seed=3)
        again.state = first.state
        assert taken(again, 75 - place) == whole[place:]


def test_ranks_that_shuffle_an_undivided_stream_read_it_once_between_them():
    seen = [taken(Stream(EveryNth(Shuffling(), rank, 2), 4, seed=3, rank=rank), 30) for rank in range(2)]
    for k in range(2):
        one_pass = [example["i"] for part in seen for example in part[15 * k : 15 * k + 15]]
        assert sorted(one_pass) == list(range(30))
    assert {e["noise"] for e in seen[0][1:]}.isdisjoint(e["noise"] for e in seen[1][1:])


def test_ranks_of_which_two_see_the_same_are_noticed():
    assert _alike([["a", "b"], ["a", "b"], ["c", "d"]]) == [(0, 1)]
    assert _alike([["a", "a", "b"], ["a", "b", "a"], []]) == []
    assert _alike([[], []]) == []


class Pictures(Numbers):
    """What a stream of a folder of images or of files of tensors yields; every second begins alike."""

    def __init__(self, kind, n=30):
        self.kind, self.n = kind, n

    def __iter__(self):
        for i in range(self.n):
            if self.kind == "pil":
                yield {"i": i, "x": [Image.new("RGB", (4, 4), (i, 0, 0))]}
            elif self.kind == "borders":  # repr shows the corners, which are black
                inner = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(i))
                yield {"x": torch.nn.functional.pad(inner, (4, 4, 4, 4)), "i": i}
            else:  # most rows are equal
                yield {"x": "", "i": i if i % 10 == 9 else 0}


def test_what_an_example_holds_is_compared_and_not_how_it_is_shown():
    for kind in ("pil", "borders"):
        assert _sample(Pictures(kind)) == _sample(Pictures(kind))
        assert len(set(_sample(Pictures(kind)))) == 30
    parts = [_sample(EveryNth(Pictures("equal"), rank, 2)) for rank in range(2)]
    assert _alike(parts) == []


def test_an_example_without_a_content_is_refused_with_the_way_out():
    class Opaque(Numbers):
        def __iter__(self):
            yield {"x": object()}

    with pytest.raises(InputError, match=r"a object has no content to hash; .*say Data\(divided=True\)"):
        _sample(Opaque())


def test_divided_is_for_a_stream():
    with pytest.raises(InputError, match="divided is for a stream, but train is a dict; leave divided out"):
        Data(tiny.table(), divided=True)
    assert fingerprint(Data(Numbers())) != fingerprint(Data(Numbers(), divided=True))


@pytest.mark.world_size(2)
def test_images_are_read_once_between_two_processes_and_what_divides_itself_is_left_alone(shared_path):
    devices = set_up()

    def read(dataset, **more):
        part = shared_out(dataset, devices.rank, 2, devices.control, **more)
        return [[example["i"] for example in other] for other in gathered(list(part))]

    def pictures():
        for i in range(20):
            yield {"i": i, "x": Image.new("RGB", (4, 4), (i, 0, 0))}

    features = datasets.Features({"i": datasets.Value("int64"), "x": datasets.Image()})
    table = datasets.Dataset.from_list(list(pictures()), features=features)
    for dataset, n in (
        (Pictures("pil"), 30),
        (Pictures("borders"), 30),
        (table.to_iterable_dataset(num_shards=4), 20),
        (split_dataset_by_node(table.to_iterable_dataset(num_shards=4), devices.rank, 2), 20),
    ):
        parts = read(dataset)
        assert sorted(chain(*parts)) == list(range(n))
        assert all(len(part) == n / 2 for part in parts)
    assert all(len(part) == 15 for part in read(Pictures("equal")))

    class Own(Pictures):  # what begins alike on both ranks, though each reads other examples
        def __iter__(self):
            yield from ({"i": i} for i in [0] * 100 + [1 + devices.rank])

    with pytest.raises(InputError, match=r"ranks 0 and 1 read the same examples of the stream; .*Data\(divided=True\)"):
        read(Own(""))
    assert read(Own(""), divided=True) == [[0] * 100 + [1], [0] * 100 + [2]]


class Failing(Numbers):
    def __iter__(self):
        yield from ({"x": torch.zeros(5), "y": 0} for _ in range(40))
        raise OSError(5, "Input/output error", "shard-3.tar")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_stream_that_fails_is_one_line(workers, capsys):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(Failing(), shuffle_buffer=1))
    said = ends_with(2, capsys, lambda: main(recipe, ["--max-steps", "9", "--workers", workers]))
    assert "example 40 of pass 0 of the stream cannot be read: OSError: [Errno 5]" in said
    assert "shard-3.tar" in said

    assert "--skip-bad" not in said


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(("odd", "said"), [({"x": torch.zeros(6), "y": 0}, "x (5,) and (6,)"), (None, "x (5,) and m")])
def test_examples_of_a_stream_that_make_no_batch_are_one_line(odd, said, workers, capsys):
    class Odd(Numbers):
        def __iter__(self):
            yield from ({"x": torch.zeros(5), "y": 0} if i != 40 else odd for i in range(100))

    recipe = replace(tiny.recipe, data=lambda cfg: Data(Odd(), shuffle_buffer=1))
    line = ends_with(2, capsys, lambda: main(recipe, ["--max-steps", "9", "--workers", workers]))
    assert f"examples of the stream ({said}" in line
    assert "give the recipe a collate" in line


def test_a_worker_of_a_stream_that_is_killed_is_replaced_once_and_no_bit_changes(tmp_path, capfd):
    class Killed(Numbers):
        def __iter__(self):
            for i in range(400):
                if i == 100 and not (tmp_path / "killed").exists() and (tmp_path / "armed").exists():
                    (tmp_path / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield {"x": torch.full((5,), i / 400), "y": i % 3}

    recipe = replace(tiny.recipe, data=lambda cfg: Data(Killed(), shuffle_buffer=10))
    for name in ("whole", "again"):
        main(recipe, ["--max-steps", "12", "--workers", "1", "--log-every", "1", "--out", str(tmp_path / name / "run")])
        (tmp_path / "armed").touch()
    assert (tmp_path / "killed").exists()
    assert bits(tmp_path / "again") == bits(tmp_path / "whole")
    assert "the workers are started again, once" in capfd.readouterr().err


@pytest.mark.world_size(3)
def test_processes_read_every_example_once_between_them(shared_path):
    devices = set_up()
    for make in (Numbers, hugging_face, OwnRank):
        part = shared_out(make(), devices.rank, 3, devices.control)
        mine = [example["i"] for example in part]
        assert sorted(i for other in gathered(mine) for i in other) == list(range(30)), make
        assert 9 <= len(mine) <= 11

    class Alike(Numbers):
        def __iter__(self):
            yield from ({"i": 0} for _ in range(self.n))

    with pytest.raises(InputError, match=r"ranks . and . read the same examples of the stream"):
        shared_out(Alike(), devices.rank, 3, devices.control)


@pytest.mark.world_size(2)
def test_two_processes_go_on_exactly(shared_path):
    def run_to(step, name):
        run = start(stream_recipe(), tiny.TinyConfig(max_steps=step, validate_every=50, out=str(shared_path / name)))
        train(run)
        return [p.detach().clone() for p in run.module.parameters()]

    whole = run_to(12, "whole")
    run_to(7, "again")
    assert all(map(torch.equal, whole, run_to(12, "again")))


def test_another_number_of_processes_is_refused_with_the_options(tmp_path):
    rows = "[{'x': x.tolist(), 'y': int(y)} for x, y in zip(tiny.table()['x'], tiny.table()['y'])]"
    path = script(
        tmp_path,
        f"from torch.utils.data import default_collate\nimport datasets\nrows = {rows}\n"
        "def stream():\n    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=6)\n"
        "def collate(examples):\n"
        "    return default_collate([{'x': torch.tensor(e['x']), 'y': e['y']} for e in examples])\n"
        "main(replace(tiny.recipe, data=lambda cfg: Data(stream(), shuffle_buffer=20), collate=collate))",
    )
    argv = [path, "--workers", "0", "--out", tmp_path / "run"]
    assert launch(*TORCHRUN, *argv, "--max-steps", "4").returncode == 0
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    refused = launch(sys.executable, *argv, "--max-steps", "8")
    assert refused.returncode == 2
    (said,) = refused.stderr.splitlines()
    assert "was made with a stream for 2 processes, shuffled 20 at a time, and now it is a stream for 1" in said
    assert "go on with the processes and the shuffle_buffer it had, or, for a new run from its weights" in said
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before

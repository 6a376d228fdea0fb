"""From indices to micro-batches: columns in memory, datasets read by workers, randomness by position."""

import datetime
import json
import random
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist

from benchmarks import large_map
from benchmarks.children import in_child
from scaletrain import Data, Given, Sequential, Weighted, main, start, steps, validate
from scaletrain.batches import length, to_device
from scaletrain.errors import InputError
from scaletrain.loader import HeldOut, Loader, copied_ahead, one_ahead
from scaletrain.order import Shuffled
from scaletrain.readers import ColumnReader, DatasetReader, make_reader
from scaletrain.share import Share, micro_batch_count
from scaletrain.workers import chosen_workers

CPU = torch.device("cpu")


class Jittered:
    """A map-style dataset whose transform draws from all three generators."""

    def __init__(self, n=48):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index >= self.n:
            raise IndexError(index)
        noise = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
        return {"row": index, "x": index + noise}


def loader(reader, *, batch_size=12, rank=0, world_size=1, micro_batch_size=None, workers=0):
    share = Share(Shuffled(reader.n, 5), batch_size, rank, world_size)
    count = micro_batch_count(batch_size, world_size, micro_batch_size)
    return Loader(reader, share, count, workers=workers, device=CPU)


def first_steps(loader, number=9, first=0):
    stream = loader.steps(first)
    return [next(stream) for _ in range(number)]


def examples(all_steps):
    """What was read, keyed by (step, row), fillers left out."""
    return {
        (step, int(row)): x.tolist()
        for step, micro_batches in enumerate(all_steps)
        for batch, counted in micro_batches
        for row, x in zip(batch["row"][:counted], batch["x"][:counted], strict=True)
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: just what is tested
def test_transforms_give_the_same_examples_on_any_workers_and_processes():
    wanted = examples(first_steps(loader(DatasetReader(Jittered(), None, seed=3))))
    assert len(wanted) == 9 * 12
    for workers in (1, 4):
        assert examples(first_steps(loader(DatasetReader(Jittered(), None, seed=3), workers=workers))) == wanted
    for micro_batch_size in (5, 1):
        reader = DatasetReader(Jittered(), None, seed=3)
        parts = [loader(reader, rank=r, world_size=5, micro_batch_size=micro_batch_size) for r in range(5)]
        assert {k: v for part in parts for k, v in examples(first_steps(part)).items()} == wanted
    assert examples(first_steps(loader(DatasetReader(Jittered(), None, seed=4)))) != wanted


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_transforms_give_the_same_examples_on_two_processes_with_any_workers(shared_path):
    wanted = examples(first_steps(loader(DatasetReader(Jittered(), None, seed=5)), 4))
    for workers in (0, 1, 4):
        cfg = tiny.TinyConfig(seed=5, batch_size=12, workers=workers, max_steps=4, out=str(shared_path / str(workers)))
        run = start(replace(tiny.recipe, data=lambda cfg: Data(Jittered())), cfg)
        parts = [None, None]
        dist.all_gather_object(parts, examples(first_steps(run.loader, 4)))
        assert all(len(part) == 4 * 6 for part in parts)
        assert parts[0] | parts[1] == wanted


def test_an_example_is_transformed_anew_in_each_epoch():
    seen = examples(first_steps(loader(DatasetReader(Jittered(), None, seed=3), batch_size=48), 2))
    assert all(seen[0, row] != seen[1, row] for row in range(48))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_resumes_at_any_step(workers):
    reader = DatasetReader(Jittered(), None, seed=3)
    whole = first_steps(loader(reader, workers=workers), 9)
    rest = first_steps(loader(reader, workers=workers), 4, first=5 * 12)
    assert examples(rest) == {(step - 5, row): x for (step, row), x in examples(whole).items() if step >= 5}


@pytest.mark.parametrize("row_bytes", [8, 10_000, 10_000_000])
def test_columns_give_the_rows_of_the_order_whatever_is_gathered_at_once(row_bytes, monkeypatch):
    reader = ColumnReader({"row": torch.arange(37), "x": torch.randn(37, 3, 2)})
    reader.row_bytes = row_bytes
    for first in (0, 12 * 1000):
        for step, ((batch, counted),) in enumerate(first_steps(loader(reader), 800, first)):
            rows = Shuffled(37, 5)(np.arange(first + 12 * step, first + 12 * (step + 1)))
            assert batch["row"].tolist() == rows.tolist()
            assert counted == 12
        assert torch.equal(batch["x"], reader.columns["x"][rows])


@pytest.mark.parametrize("dataset", [False, True], ids=["columns", "dataset"])
def test_every_process_has_the_same_number_of_micro_batches_and_none_is_empty(dataset):
    columns = {"row": torch.arange(37), "x": torch.randn(37, 3)}
    reader = DatasetReader(Jittered(37)) if dataset else ColumnReader(columns)
    for rank in range(5):
        (micro_batches,) = first_steps(loader(reader, rank=rank, world_size=5, micro_batch_size=1), 1)
        assert [counted for _, counted in micro_batches] == ([1, 1, 1] if rank in (2, 4) else [0, 1, 1])
        assert [len(batch["row"]) for batch, _ in micro_batches] == [1, 1, 1]


def test_held_out_examples_lie_on_exactly_one_process_in_equally_many_batches():
    reader = ColumnReader({"row": torch.arange(23)})
    for world_size in (1, 2, 4, 30):
        parts = [list(HeldOut(reader, 3, r, world_size, workers=0, device=CPU)) for r in range(world_size)]
        assert len({len(part) for part in parts}) == 1
        rows = [row for part in parts for batch, counted in part for row in batch["row"][:counted].tolist()]
        assert rows == list(range(23))


def test_float64_columns_become_float32_unless_the_model_is_double_and_labels_int64_a_batch_at_a_time():
    columns = {"x": torch.zeros(3, dtype=torch.float64), "label": torch.zeros(3, dtype=torch.int32)}
    first = (np.arange(1), np.arange(1))
    for double, wanted in ((False, torch.float32), (True, torch.float64)):
        reader = make_reader(columns, None, 0, double=double)
        assert reader.columns["x"] is columns["x"]
        assert reader(first).batch["x"].dtype == wanted
        assert reader(first).batch["label"].dtype == torch.int64


def test_numpy_columns_are_taken_without_a_copy():
    array = np.zeros((4, 2), dtype=np.float32)
    data = Data({"x": array})
    array[:] = 7
    assert data.train["x"].eq(7).all()


class Unhurried(Jittered):
    """A data set of which a batch of 8 takes 8 ms."""

    def __getitem__(self, index):
        time.sleep(1e-3)
        return super().__getitem__(index)


class Broken(Jittered):
    def __getitem__(self, index):
        raise OSError("no such disk")


def test_workers_read_what_takes_longer_than_the_way_from_a_worker(monkeypatch):
    monkeypatch.setattr("scaletrain.workers.cores", lambda: 8)
    assert chosen_workers(ColumnReader({"x": torch.zeros(3)}), 4, 1, 8) == 0
    assert chosen_workers(DatasetReader(Jittered()), 3, 1, 8) == 3
    assert chosen_workers(DatasetReader(Jittered(5)), None, 1, 8) == 0
    for reader in (DatasetReader(Unhurried()), DatasetReader(Broken())):
        assert chosen_workers(reader, None, 1, 8) == 4
        assert chosen_workers(reader, None, 4, 8) == 1
        assert chosen_workers(reader, None, 8, 8) == 0


@pytest.mark.parametrize("kind", ["dict", "tuple", "tensor"])
def test_a_batch_may_be_a_dict_a_tuple_or_a_tensor(kind, tmp_path):
    class Rows:
        def __len__(self):
            return 40

        def __getitem__(self, i):
            x = torch.full((5,), float(i)) / 40
            return {"dict": {"x": x, "y": i % 2}, "tuple": (x, i % 2), "tensor": x}[kind]

    def loss(model, batch, cfg):
        x = {"dict": lambda: batch["x"], "tuple": lambda: batch[0], "tensor": lambda: batch}[kind]()
        assert len(x) == length(batch)
        return model(x).square().mean()

    recipe = replace(tiny.recipe, data=lambda cfg: Data(Rows(), val=Rows()), loss=loss, evaluate=None)
    run = start(recipe, tiny.TinyConfig(max_steps=4, workers=1))
    assert len(list(steps(run))) == 4
    assert validate(run)["val_loss"] > 0


def test_collate_puts_examples_of_different_lengths_together(tmp_path):
    sequences = [torch.ones(1 + i % 4, 5) for i in range(20)]

    def pad(rows):
        return {"x": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    def loss(model, batch, cfg):
        return model(batch["x"]).mean()

    recipe = replace(tiny.recipe, data=lambda cfg: Data(sequences), collate=pad, loss=loss)
    assert len(list(steps(start(recipe, tiny.TinyConfig(max_steps=3, workers=0))))) == 3


def test_an_exception_in_a_worker_reaches_the_user():
    class Broken(Jittered):
        def __getitem__(self, index):
            raise KeyError(f"no file for {index}")

    for workers in (0, 1):
        with pytest.raises(
            InputError, match=r"example \d+ cannot be read: KeyError: 'no file for \d+' \(test_loader.py, line"
        ):
            first_steps(loader(DatasetReader(Broken()), workers=workers), 1)


def test_batches_of_every_kind_move_to_a_device():
    meta = torch.device("meta")
    batch = {"a": torch.zeros(2), "b": (torch.zeros(2), [torch.zeros(2)]), "c": "text"}
    moved = to_device(batch, meta)
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1][0].is_meta
    assert moved["c"] == "text"
    assert to_device(batch, CPU) is batch


def test_one_is_taken_ahead_and_what_that_raises_comes_in_its_turn():
    done = []

    def numbers(last, error=None):
        for i in range(last):
            done.append(f"take {i}")
            yield i
        if error:
            raise error

    def use(items):
        done.extend(f"use {i}" for i in items)

    use(one_ahead(numbers(4)))
    assert done == ["take 0", "use 0", "take 1", "take 2", "use 1", "take 3", "use 2", "use 3"]
    for last in range(4):
        done.clear()
        with pytest.raises(InputError, match="example 7"):
            use(one_ahead(numbers(last, InputError("example 7 cannot be read"))))
        assert done[-1:] == [f"use {last - 1}"] * (last > 0)
        assert [did for did in done if did.startswith("use")] == [f"use {i}" for i in range(last)]
    assert list(one_ahead(iter([]))) == []
    assert list(one_ahead(iter([1]))) == [1]


class StandIn:
    """A CUDA stream or event that writes down what is asked of it."""

    def __init__(self, told, name):
        self.told, self.name = told, name

    def record_event(self):
        return StandIn(self.told, "event")

    def wait_event(self, event):
        self.told.append(f"{self.name} waits")


@pytest.mark.parametrize("last", [0, 1, 2, 5])
def test_copies_to_cuda_are_waited_for_and_handed_out_in_order_up_to_the_one_that_fails(last, monkeypatch):
    told = []

    def to_stand_in(batch, device):
        told.append(f"copy {int(batch['x'][0])}")
        return batch

    monkeypatch.setattr("scaletrain.loader.copies_without_waiting", lambda kind: True)
    monkeypatch.setattr("scaletrain.loader.to_device", to_stand_in)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: StandIn(told, "copying"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: StandIn(told, "computing"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(f"keep {int(tensor[0])}"))

    def found():
        for i in range(last):
            yield {"x": torch.tensor([i])}, f"rest {i}"
        raise InputError(f"example {last} cannot be read")

    handed = []

    def train():
        for batch, rest in copied_ahead(found(), CPU):
            handed.append((int(batch["x"][0]), rest))
            told.append(f"use {handed[-1][0]}")

    with pytest.raises(InputError, match=f"example {last} cannot"):
        train()
    assert handed == [(i, f"rest {i}") for i in range(last)]
    for i in range(last):
        turn = told.index(f"use {i}")
        assert told[turn - 2 : turn] == ["computing waits", f"keep {i}"]
        assert (f"copy {i + 1}" in told[:turn]) == (0 < i < last - 1)


class Slow(Jittered):
    """Rows that take 5 ms each."""

    def __getitem__(self, i):
        time.sleep(0.005)
        return {"x": torch.zeros(5), "y": i % 3}


def test_waiting_for_data_is_recorded_and_said_once_with_what_to_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scaletrain.hooks.JUDGED_SECONDS", 0.2)
    argv = ["--max-steps", "12", "--batch-size", "8", "--log-every", "1", "--out", str(tmp_path / "run")]
    main(replace(tiny.recipe, data=lambda cfg: Data(Slow(40))), [*argv, "--workers", "0"])
    said = capsys.readouterr().out
    assert said.count("training waits for data") == 1
    assert "--workers 2 reads ahead in more processes (now 0)" in said
    lines = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    assert all(0.5 < line["waiting_for_data"] <= 1 for line in lines)


def test_training_that_does_not_wait_says_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scaletrain.hooks.JUDGED_SECONDS", 0)
    main(tiny.recipe, ["--max-steps", "30", "--log-every", "1", "--out", str(tmp_path / "run")])
    assert "waits for data" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    assert all(0 <= line["waiting_for_data"] < 1 for line in lines)


class Together(Jittered):
    """Rows read many at once; ``kind`` says as what."""

    def __init__(self, kind, n=48):
        self.kind, self.n = kind, n

    def __getitems__(self, indices):
        if self.kind == "random":
            torch.rand(())
        rows = [{"row": i, "x": torch.tensor([float(i)])} for i in indices]
        if self.kind == "examples":
            return rows
        return {"row": torch.tensor(indices), "x": torch.tensor(indices)[:, None].float()}


@pytest.mark.parametrize("kind", ["columns", "examples"])
@pytest.mark.parametrize("collate", [None, lambda rows: {"row": torch.tensor([int(row["row"]) for row in rows])}])
def test_a_dataset_that_reads_many_rows_at_once_is_asked_so(kind, collate):
    reader = make_reader(Together(kind), collate, 0, double=False)
    for k, ((batch, counted),) in enumerate(first_steps(loader(reader), 5)):
        assert counted == 12
        assert batch["row"].tolist() == Shuffled(48, 5)(np.arange(12 * k, 12 * k + 12)).tolist()
        if collate is None:
            assert batch["x"][:, 0].tolist() == batch["row"].tolist()


class OnlyTogether:
    def __len__(self):
        return 48

    def __getitems__(self, indices):
        return {"x": torch.rand(len(indices), 3)}


def test_random_numbers_in_getitems_are_noticed():
    with pytest.raises(InputError, match=r"OnlyTogether.__getitems__ draws random numbers, .*draw them in __getitem__"):
        first_steps(loader(make_reader(OnlyTogether(), None, 0, double=False)), 1)


def test_collate_gets_the_rows_of_columns_too():
    columns = {"row": torch.arange(48)}
    reader = make_reader(columns, lambda rows: {"row": torch.stack([row["row"] for row in rows])}, 0, double=False)
    (((batch, _),),) = first_steps(loader(reader), 1)
    assert batch["row"].tolist() == Shuffled(48, 5)(np.arange(12)).tolist()


@pytest.mark.parametrize("order", [Sequential(101), Given(np.array([5, 3, 5])), Weighted.balanced(tiny.table()["y"])])
def test_data_may_have_an_order_of_its_own(order, tmp_path):
    seen = []

    def loss(model, batch, cfg):
        seen.extend(batch["row"].tolist())
        return tiny.loss(model, batch, cfg)

    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table(), order=order), loss=loss)
    main(recipe, ["--max-steps", "20", "--out", str(tmp_path / "run")])
    assert seen == order(np.arange(320)).tolist()
    if isinstance(order, Weighted):
        drawn = np.bincount(tiny.table()["y"][seen])
        assert drawn.min() > 0.7 * drawn.max()


def test_an_order_that_asks_for_an_example_that_is_not_there_is_refused(tmp_path):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table(), order=Given(np.array([5, 101]))))
    with pytest.raises(InputError, match="the order asks for example 101, but there are 101: 0 to 100"):
        start(recipe, tiny.TinyConfig(max_steps=1, out=str(tmp_path)))


def test_fifty_million_rows_in_a_memory_map_take_less_than_a_gigabyte():
    with tempfile.TemporaryDirectory() as folder:  # sparse files: hardly any bytes are stored
        large_map.make_files(Path(folder), 50_000_000)
        found = in_child("benchmarks.large_map", "--folder", folder, "--steps", 60)
    assert found["examples"] == 45_000_000
    assert found["peak"] < 1e9


def test_columns_may_live_on_the_device():
    reader = ColumnReader({"row": torch.arange(48), "x": torch.randn(48, 3)})
    reader.move_to(torch.device("meta"))
    batch, _ = reader((np.arange(5), np.arange(5)))
    assert batch["x"].shape == (5, 3)
    assert batch["x"].is_meta
    assert reader.device.type == "meta"


def test_columns_that_were_moved_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("scaletrain.readers.KEPT_BYTES", 0)
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (48, 3))
    reader = ColumnReader(Data({"x": mapped}).train)
    assert not reader.in_memory
    reader.move_to(torch.device("meta"))
    assert reader.in_memory


class Drawing:
    """A dataset with __getitems__ that draws what __getitem__ draws, as torch's Subset does."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return {"row": i, "x": i + torch.rand(3)}

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_a_dataset_whose_getitems_draws_is_read_example_by_example():
    wanted = examples(first_steps(loader(make_reader(Drawing(), None, 3, double=False))))
    subset = torch.utils.data.Subset(Drawing(), range(48))
    for workers in (0, 1):
        found = first_steps(loader(make_reader(subset, None, 3, double=False), workers=workers))
        assert examples(found) == wanted


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"x": torch.zeros(3), "y": 1}, r"\(x \(2,\) and \(3,\)\) make no batch: RuntimeError: stack expects"),
        ({"x": torch.zeros(2), "y": None}, r"\(y int and NoneType\) make no batch: RuntimeError"),
        ({"x": torch.zeros(2)}, r"\(y int and missing\) make no batch: KeyError"),
        ({"x": torch.zeros(2), "y": 1, "z": [1]}, None),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_examples_that_make_no_batch_are_named(odd, said, together):
    rows = [odd if i == 7 else {"x": torch.zeros(2), "y": 1} for i in range(12)]

    class Rows(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    reader = make_reader(Rows(rows) if together else rows, None, 0, double=False)
    read = partial(reader, (np.arange(12), np.arange(12)))
    if said is None:  # a column more in one of them is left out, as torch does
        assert len(read().batch["x"]) == 12
        return
    with pytest.raises(InputError, match=rf"the examples 0 and 7 {said}.*give the recipe a collate that pads or packs"):
        read()


def test_examples_of_a_type_that_makes_no_batch_are_one_line():
    rows = [{"when": datetime.date(2020, 1, 1)}] * 12
    with pytest.raises(InputError, match=r"^the examples 0, 1, .*, 7, ... make no batch: TypeError: default_collate"):
        make_reader(rows, None, 0, double=False)((np.arange(12), np.arange(12)))

    def broken(examples):
        raise IndexError("pop from empty list")

    with pytest.raises(InputError, match=r"make no batch: IndexError: pop from empty list \(test_loader.py, line"):
        make_reader(rows, broken, 0, double=False)((np.arange(12), np.arange(12)))


class Sized:
    """Images of rows that stack only with their like; row 5 cannot be read."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return self.__getitems__([i])

    def __getitems__(self, indices):
        if 0 in [self.sizes[i] for i in indices]:
            raise OSError(5, "Input/output error")
        return {"x": torch.stack([torch.zeros(self.sizes[i]) for i in indices]), "row": torch.tensor(indices)}


@pytest.mark.parametrize("instead", [None, Sequential(8)])
def test_a_dataset_read_many_rows_at_once_says_which_row_it_was(instead):
    request = (np.arange(8), np.arange(8))
    mixed = make_reader(Sized([2, 2, 3, 2, 2, 2, 2, 2]), None, 0, double=False, instead=instead)
    with pytest.raises(InputError, match=r"the examples 0, 1, .* cannot be read together: RuntimeError: stack expects"):
        mixed(request)
    broken = make_reader(Sized([2, 2, 2, 2, 2, 0, 2, 2]), None, 0, double=False, instead=instead)
    if instead is None:
        with pytest.raises(InputError, match=r"^example 5 cannot be read: OSError: .*--skip-bad"):
            broken(request)
    else:
        batch, (bad,) = broken(request)
        assert (bad.example, batch["row"][5].item()) == (5, bad.replaced_by)
    drawing = make_reader(OnlyTogether(), None, 0, double=False, instead=instead)
    with pytest.raises(InputError, match=r"^OnlyTogether.__getitems__ draws random numbers"):
        drawing(request)


def test_an_iterator_and_a_buffer_of_none_are_refused():
    with pytest.raises(InputError, match="train is an iterator, which can be read once"):
        Data(train=(i for i in range(3)))
    with pytest.raises(InputError, match="shuffle_buffer is 0"):
        Data(train={"x": np.arange(3)}, shuffle_buffer=0)


def test_a_sample_is_spread_over_all_examples():
    columns = {"x": np.arange(100)}
    assert Data(columns).sample(4)["x"].tolist() == [0, 33, 66, 99]
    assert Data(columns).sample()["x"].tolist() == list(range(100))
    assert Data(Drawing()).sample(2)["row"].tolist() == [0, 47]

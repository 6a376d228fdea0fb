"""Data under fire: resumed at every step, workers killed and hung, files that vanish: rows L1 to L4."""

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from itertools import chain, product
from math import isqrt

import numpy as np
import psutil
import pytest
import tiny
import torch
import torch.distributed as dist
from faultload import ALL, amount, draw, report
from launching import ROOT, TORCHRUN, launch, script
from PIL import Image
from test_checkpoints import ends_with, left_after
from test_loader import CPU, Jittered

from scaletrain import Data, InputError, load, main, start, train
from scaletrain import workers as workers_module
from scaletrain.content import fingerprint
from scaletrain.loader import Loader
from scaletrain.order import Given, Sequential, Shuffled, Weighted
from scaletrain.readers import ColumnReader, DatasetReader
from scaletrain.share import Share, micro_batch_count
from scaletrain.sources import columns

N, BATCH = 37, 8
STEPS = -(-3 * N // BATCH)

# L1: an oracle written from the definition of the orders, one position at a time


MASK = (1 << 64) - 1
STRIDE = 0x9E3779B97F4A7C15


def mixed(word):
    """The finishing steps of splitmix64."""
    word ^= word >> 30
    word = word * 0xBF58476D1CE4E5B9 & MASK
    word ^= word >> 27
    word = word * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def key(*numbers):
    word = 0
    for number in numbers:
        word = mixed((word ^ number) + STRIDE & MASK)
    return word


def feistel(place, n, key):
    """The permutation of ``Shuffled`` in plain Python integers."""
    a = max(8, isqrt(n - 1) + 1)
    b = max(8, -(-n // a))
    while True:
        left, right = divmod(place, b)
        for r in range(8):
            round_key = key + r * STRIDE & MASK
            if r % 2 == 0:
                left = (left + ((mixed(right + round_key & MASK) >> 32) * a >> 32)) % a
            else:
                right = (right + ((mixed(left + round_key & MASK) >> 32) * b >> 32)) % b
        place = left * b + right
        if place < n:
            return place


def oracle(kind, position):
    epoch, place = divmod(position, N)
    if kind == "shuffled":
        return feistel(place, N, mixed(epoch + key(5, 0) & MASK))
    if kind == "sequential":
        return place
    if kind == "given":
        return (place * 7 + 3) % N
    uniform = (mixed(position + key(5, 1) & MASK) >> 11) * 2.0**-53
    bounds = np.cumsum(np.arange(1, N + 1) / sum(range(1, N + 1)))
    return int(sum(uniform >= bound for bound in bounds / bounds[-1]))


ORDERS = {
    "shuffled": Shuffled(N, 5),
    "sequential": Sequential(N),
    "given": Given((np.arange(N) * 7 + 3) % N),
    "weighted": Weighted(np.arange(1, N + 1), 5),
}


def rows_of(loader, first, number):
    """What each step reads, fillers left out."""
    steps = loader.steps(first)
    return [[int(row) for batch, counted in next(steps) for row in batch["row"][:counted]] for _ in range(number)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: just what is tested
@pytest.mark.parametrize("workers", [0, 1, 2, 4] if ALL else [0, 2])
@pytest.mark.parametrize("kind", ORDERS)
def test_from_every_step_of_three_epochs_every_process_reads_what_the_oracle_says(kind, workers):
    wanted = [[oracle(kind, step * BATCH + i) for i in range(BATCH)] for step in range(STEPS)]
    done = 0
    firsts = range(STEPS) if workers == 0 else draw(f"L1 {kind}").sample(range(STEPS), amount(STEPS, 2))
    for world_size, first in product((1, 2, 3), firsts):
        parts = []
        for rank in range(world_size):
            share = Share(ORDERS[kind], BATCH, rank, world_size)
            for reader in (ColumnReader({"row": torch.arange(N)}), DatasetReader(Jittered(N), seed=3)):
                count = micro_batch_count(BATCH, world_size, 3)
                loader = Loader(reader, share, count, workers=workers, device=CPU)
                parts.append(rows_of(loader, first * BATCH, min(4, STEPS - first)))
        for by_reader in (parts[0::2], parts[1::2]):
            for k, step in enumerate(zip(*by_reader, strict=True)):
                assert list(chain(*step)) == wanted[first + k], (kind, workers, world_size, first)
        done += 1
    if kind in ("shuffled", "sequential", "given"):
        for epoch in range(3):
            flat = list(chain(*wanted))[epoch * N : (epoch + 1) * N]
            assert sorted(flat) == list(range(N))
    report(f"L1 resumed at every step, {kind}, {workers} workers, 1-3 processes", done, "the oracle's examples")


def test_the_shuffle_is_a_permutation_for_any_size_seed_epoch_and_number_of_processes():
    cases, rng = amount(10_000, 300), draw("L5")
    for _ in range(cases):
        n, world_size = round(2 ** rng.uniform(0, 11)), rng.randint(1, 4)
        order, epoch = Shuffled(n, rng.getrandbits(63)), rng.randrange(2**30)
        batch_size = rng.randint(world_size, 3 * world_size)
        shares = [Share(order, batch_size, rank, world_size) for rank in range(world_size)]
        first, steps = epoch * n, -(-n // batch_size)
        blocks = [share.block(first, steps) for share in shares]
        seen = np.concatenate([rows[at < first + n] for at, rows in blocks])
        assert np.array_equal(np.sort(seen), np.arange(n)), (n, world_size, epoch, order.seed)
    report("L5 random size, seed, epoch, batch size and processes", cases, "each example once an epoch")


class Noisy:
    """Rows of the table, with noise; one may be made to fail."""

    def __init__(self, fail=None, n=101):
        self.table, self.fail = {name: torch.as_tensor(c) for name, c in tiny.table(n).items()}, fail

    def __len__(self):
        return len(self.table["row"])

    def __getitem__(self, i):
        if self.fail is not None:
            self.fail(i)
        row = {name: column[i] for name, column in self.table.items()}
        return row | {"x": row["x"] + 0.1 * torch.randn(5, dtype=torch.float64)}


def recipe_with(fail=None):
    return replace(tiny.recipe, data=lambda cfg: Data(Noisy(fail)))


def bits(folder):
    return [(folder / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors")]


def test_two_resumes_in_one_epoch_change_nothing(tmp_path):
    argv = ["--log-every", "1", "--max-steps", "9", "--batch-size", "12"]
    main(recipe_with(), [*argv, "--out", str(tmp_path / "whole")])
    main(recipe_with(), [*argv, "--checkpoint-every", "1", "--keep-last", "99", "--out", str(tmp_path / "run")])
    left_after(tmp_path / "run", 2)
    for max_steps in ("5", "9"):
        more = ["--max-steps", max_steps, "--checkpoint-every", "1", "--out", str(tmp_path / "run")]
        main(recipe_with(), [*argv, *more])
    assert bits(tmp_path / "run")[1] == bits(tmp_path / "whole")[1]


@pytest.mark.parametrize("processes", [pytest.param(n, marks=pytest.mark.world_size(n)) for n in (2, 3)])
def test_processes_that_stop_twice_in_an_epoch_read_what_the_oracle_says(processes, shared_path):
    """Train 3 epochs with every order, stopped at two steps of one of them; compare what was read with the oracle."""
    steps_done = []

    def loss(model, batch, cfg):
        steps_done.append(batch["row"].tolist())
        return tiny.loss(model, batch, cfg)

    for kind, workers in product(ORDERS, (None, 1)):
        train_on = tiny.table(N) if workers is None else Noisy(n=N)
        order = None if kind == "shuffled" else ORDERS[kind]
        data = Data(train_on, order=order)
        recipe = replace(tiny.recipe, data=lambda cfg, data=data: data, loss=loss)
        where = str(shared_path / f"{kind}-{workers}")
        mine = []
        for last in (6, 8, None):  # steps 6 and 8 lie in the second epoch
            cfg = tiny.TinyConfig(seed=5, batch_size=BATCH, epochs=3, max_steps=last, workers=workers, out=where)
            run = start(recipe, cfg)
            assert run.total_steps == (last or STEPS)
            steps_done.clear()
            train(run)
            mine += steps_done
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        read = [list(chain(*step)) for step in zip(*parts, strict=True)]
        assert read == [[oracle(kind, step * BATCH + i) for i in range(BATCH)] for step in range(STEPS)], kind


OTHER_ORDERS = ("Weighted(range(1, 102), seed=5)", "Given(range(100, -1, -2))", "Sequential(101)")
ONE_AFTER_ANOTHER = """
for k, order in enumerate(({})):
    recipe = replace(tiny.recipe, data=lambda cfg, order=order: Data(tiny.table(), order=order))
    options = ["--double", "--log-every", "1", "--batch-size", "12", "--max-steps", sys.argv[2]]
    main(recipe, [*options, "--out", f"{{sys.argv[1]}}/{{k}}"])
"""


def test_any_order_goes_on_on_another_number_of_processes_with_the_same_examples(tmp_path):
    path = script(tmp_path, ONE_AFTER_ANOTHER.format(", ".join(OTHER_ORDERS)))
    alone, together = (sys.executable,), TORCHRUN
    for name, last, launcher in (
        ("whole", 18, alone),
        ("chain", 5, together),
        ("chain", 11, alone),
        ("chain", 18, together),
    ):
        done = launch(*launcher, path, tmp_path / name, last)
        assert done.returncode == 0, done.stderr
    for k in range(len(OTHER_ORDERS)):
        whole, chain = (
            [json.loads(line) for line in (tmp_path / name / str(k) / "metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "chain")
        )
        assert [line["step"] for line in chain] == [line["step"] for line in whole] == list(range(1, 19))
        assert [line["loss"] for line in chain] == pytest.approx([line["loss"] for line in whole], rel=1e-9)


# L2: workers that die and hang


def once(path, act):
    """A function of an example's index that acts at index 40, the first time in any process."""

    def fail(i):
        if i == 40 and not path.exists():
            path.touch()
            act()

    return fail


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_replaced_once_and_no_bit_changes(tmp_path, capfd):
    argv = ["--max-steps", "12", "--workers", "2", "--log-every", "1"]
    main(recipe_with(), [*argv, "--out", str(tmp_path / "whole")])
    times = amount(20, 1)
    for i in range(times):
        fail = once(tmp_path / f"done{i}", killed)
        main(recipe_with(fail), [*argv, "--out", str(tmp_path / f"run{i}")])
        assert bits(tmp_path / f"run{i}") == bits(tmp_path / "whole")
        said = capfd.readouterr().err
        assert re.search(r"warning: DataLoader worker .*(killed by signal: Killed|exited unexpectedly)", said)
    report("L2 a worker killed", times, "started again from where it was, all bits equal")


def test_a_pipe_that_breaks_before_the_worker_is_dead_counts_once(tmp_path, monkeypatch, capfd):
    argv = ["--max-steps", "12", "--workers", "1", "--log-every", "1"]
    main(recipe_with(), [*argv, "--out", str(tmp_path / "whole")])
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    get, answered = iterator._try_get_data, []

    def break_the_third(self, *args, **kwargs):
        answered.append(self)
        if len(answered) == 3:
            raise ConnectionResetError(104, "Connection reset by peer")
        if len(answered) == 4:  # of the workers started again
            workers_module._WAITING._inside = False  # the death is told between two answers
            answered[2]._workers[0].kill()
            time.sleep(0.5)
        return get(self, *args, **kwargs)

    monkeypatch.setattr(iterator, "_try_get_data", break_the_third)
    main(recipe_with(), [*argv, "--out", str(tmp_path / "run")])
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert capfd.readouterr().err.count("the workers are started again, once") == 1


def test_a_worker_that_dies_again_ends_the_run_by_name(tmp_path):
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(?s?\)? ?\d+\).*"):
        main(recipe_with(lambda i: killed() if i == 40 else None), ["--max-steps", "12", "--workers", "1"])
    assert not [child for child in psutil.Process().children() if "pt_data_worker" in " ".join(child.cmdline())]


def test_a_worker_that_hangs_is_replaced(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers_module, "TIMEOUT_SECONDS", 4)
    argv = ["--max-steps", "12", "--workers", "1", "--log-every", "1"]
    main(recipe_with(), [*argv, "--out", str(tmp_path / "whole")])
    fail = once(tmp_path / "hung", lambda: time.sleep(1000))
    main(recipe_with(fail), [*argv, "--out", str(tmp_path / "run")])
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert "DataLoader timed out after 4 seconds" in capfd.readouterr().err
    report("L2 a worker hangs", 1, "started again from where it was, all bits equal")


def test_what_means_a_lost_worker_and_what_does_not(capfd):
    for error in (
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        RuntimeError("DataLoader timed out after 300 seconds"),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
        FileNotFoundError(2, "No such file or directory"),
    ):
        assert workers_module.worker_is_lost(error)
        assert "DataLoader" in capfd.readouterr().err
    for error in (
        OSError(24, "Too many open files"),
        OSError(12, "Cannot allocate memory"),
        PermissionError(13, "Permission denied"),
        FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
    ):
        assert not workers_module.worker_is_lost(error)


# L2, L3: examples that cannot be read


def corrupt(*indices):
    def fail(i):
        if i in indices:
            raise OSError(5, "Input/output error", f"picture-{i}.png")

    return fail


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_example_that_cannot_be_read_ends_the_run_naming_file_and_index(workers, tmp_path, capsys):
    said = ends_with(2, capsys, lambda: main(recipe_with(corrupt(17)), ["--max-steps", "12", "--workers", workers]))
    assert "example 17 cannot be read: OSError: [Errno 5] Input/output error: 'picture-17.png'" in said
    assert "--skip-bad" in said


def test_bad_examples_are_replaced_by_the_same_ones_also_when_the_run_goes_on(tmp_path, capfd):
    argv = ["--max-steps", "20", "--skip-bad", "3", "--log-every", "1"]
    bad = corrupt(17, 40, 99)
    main(recipe_with(bad), [*argv, "--out", str(tmp_path / "whole")])
    told = capfd.readouterr().err
    assert told.count("warning: example") == 3
    for workers, step in product(("0", "2"), draw("L3").sample(range(1, 20), amount(19, 2))):
        home = tmp_path / f"{workers}-{step}"
        more = ["--workers", workers, "--out", str(home)]
        main(recipe_with(bad), [*argv, "--checkpoint-every", str(step), "--keep-last", "99", *more])
        left_after(home, step)
        main(recipe_with(bad), [*argv, *more])
        assert bits(home) == bits(tmp_path / "whole")
        assert (home / "result.json").read_bytes() == (tmp_path / "whole/result.json").read_bytes()
    assert '"examples_replaced"' in (tmp_path / "whole/result.json").read_text()
    assert "picture-99.png" in (tmp_path / "whole/result.json").read_text()
    report("L3 three bad examples, resumed", amount(19, 2) * 2, "the same replacements, all bits equal")


@pytest.mark.parametrize(
    ("order", "allowed"),
    [
        (Given(np.arange(50)), range(50)),
        (Weighted(np.where(np.arange(101) % 2, 1.0, 0.0)), range(1, 101, 2)),
    ],
    ids=["given", "weighted"],
)
def test_a_bad_example_is_replaced_by_one_of_the_order_also_on_other_workers_and_processes(order, allowed):
    bad = corrupt(*(i for i in allowed if i % 5 == 2))
    wanted = []
    for world_size, workers in ((1, 0), (1, 1), (2, 0), (3, 0)):
        parts = []
        for rank in range(world_size):
            reader = DatasetReader(Noisy(bad), seed=3, instead=order)
            share = Share(order, 10, rank, world_size)
            parts.append(rows_of(Loader(reader, share, 1, workers=workers, device=CPU, most_bad=101), 0, 21))
            parts[-1][7:] = rows_of(Loader(reader, share, 1, workers=workers, device=CPU, most_bad=101), 70, 14)
        found = [list(chain(*step)) for step in zip(*parts, strict=True)]
        wanted = wanted or found
        assert found == wanted
    read = set(chain(*wanted))
    assert read <= set(allowed)
    assert all(i % 5 != 2 for i in read)
    assert len(read) > 30


def test_more_bad_examples_than_allowed_end_the_run(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        main(recipe_with(corrupt(17, 40, 99)), ["--max-steps", "20", "--skip-bad", "2"])
    assert ended.value.code == 2
    assert "; --skip-bad allows 2, and it is number 3; mend some, or allow more to go on" in capfd.readouterr().err


@pytest.mark.world_size(2)
def test_what_processes_replaced_is_added_up_at_a_checkpoint_and_known_to_all_that_go_on(shared_path):
    order = Given(np.arange(48))  # of each step of 12, rank 0 reads the first 6
    recipe = replace(recipe_with(corrupt(1, 3, 7, 9)), data=lambda cfg: Data(Noisy(corrupt(1, 3, 7, 9)), order=order))

    def run_to(last, skip_bad, name="run", **more):
        where = {"workers": 0, "out": str(shared_path / name)}
        run = start(recipe, tiny.TinyConfig(batch_size=12, max_steps=last, skip_bad=skip_bad, **where, **more))
        train(run)
        return run

    assert sorted(run_to(2, 3).loader.bad) == [1, 3, 7, 9]  # 2 on each, and all are saved
    with pytest.raises(InputError, match=r"--skip-bad allows 3, and it is number 4; mend some, or allow more"):
        run_to(4, 3)
    assert sorted(run_to(4, 4).loader.bad) == [1, 3, 7, 9]
    with pytest.raises(InputError, match=r"--skip-bad allows 3, and it is number 4"):
        run_to(4, 3, "in one go", checkpoint_every=2)


def test_a_run_goes_on_alone_from_what_two_processes_replaced(tmp_path, capfd):
    body = (
        "import sys; sys.path.insert(0, 'tests')\nfrom test_faults_data import Noisy, corrupt\n"
        "main(replace(tiny.recipe, data=lambda cfg: Data(Noisy(corrupt(17, 40, 99)))))"
    )
    argv = [script(tmp_path, body), "--workers", "0", "--out", tmp_path / "run", "--skip-bad", "3"]
    assert launch(*TORCHRUN, *argv, "--max-steps", "14", PYTHONPATH=str(ROOT)).returncode == 0
    alone = launch(sys.executable, *argv, "--max-steps", "20", PYTHONPATH=str(ROOT))
    assert alone.returncode == 0, alone.stderr
    assert "takes its place" not in alone.stderr  # all three are known
    assert len(json.loads((tmp_path / "run/result.json").read_text())["examples_replaced"]) == 3


def test_validation_never_replaces_an_example(tmp_path, capsys):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table(), val=Noisy(corrupt(17))))
    said = ends_with(2, capsys, lambda: main(recipe, ["--max-steps", "20", "--skip-bad", "9"]))
    assert "example 17 cannot be read" in said


# L4: other data under the same name


def test_data_that_changed_between_runs_is_refused(tmp_path, capsys):
    def with_table(change):
        def data(cfg):
            table = tiny.table()
            change(table)
            return Data(table, tiny.table(53, seed=1))

        return replace(tiny.recipe, data=data)

    def shorter(table):
        for name in table:
            table[name] = table[name][:-1]

    def reversed_(table):
        for name in table:
            table[name] = table[name][::-1]

    def other_type(table):
        table["w"] = table["w"].astype(np.int32)

    def other_value(table):
        table["x"][0, 0] += 1

    argv = ["--max-steps", "5", "--out", str(tmp_path / "run")]
    main(with_table(lambda table: None), argv)
    changes = (shorter, reversed_, other_type, other_value)
    for change in changes:
        said = ends_with(2, capsys, lambda change=change: main(with_table(change), [*argv, "--max-steps", "9"]))
        assert "was made with other training or validation data" in said
    report("L4 other data under the same name", len(changes), "refused")


class Shifted:
    """A map-style dataset that draws, with some rows that cannot be read and some that are another each time."""

    def __init__(self, shift=0):
        self.shift = shift

    def __len__(self):
        return 100

    def __getitem__(self, i):
        if i == 0:
            raise OSError(5, "Input/output error")
        noise = np.random.default_rng().random() if i == 33 else np.random.rand()  # 33 is as the user made it
        return {"x": torch.full((5,), float(i + self.shift + noise)), "y": i % 3}


def test_a_map_style_data_set_that_changed_between_runs_is_refused(tmp_path, capsys):
    argv = ["--workers", "0", "--skip-bad", "1", "--out", str(tmp_path / "run")]
    seen = np.random.get_state()[1].tolist()
    assert fingerprint(Data(Shifted())) == fingerprint(Data(Shifted()))
    assert np.random.get_state()[1].tolist() == seen
    main(replace(tiny.recipe, data=lambda cfg: Data(Shifted())), [*argv, "--max-steps", "5"])
    main(replace(tiny.recipe, data=lambda cfg: Data(Shifted())), [*argv, "--max-steps", "6"])
    recipe = replace(tiny.recipe, data=lambda cfg: Data(Shifted(5)))
    said = ends_with(2, capsys, lambda: main(recipe, [*argv, "--max-steps", "9"]))
    assert "was made with other training or validation data" in said
    images = [[{"x": Image.new("RGB", (9, 9), (red, 0, 0))} for _ in range(9)] for red in (1, 1, 2)]
    assert fingerprint(Data(images[0])) == fingerprint(Data(images[1])) != fingerprint(Data(images[2]))


def test_an_order_that_changed_between_runs_is_refused(tmp_path, capsys):
    swapped, heavier = np.arange(100_000), np.ones(100_000)
    swapped[[5_000, 60_000]] = swapped[[60_000, 5_000]]
    heavier[50_000] = 50
    table = {"x": np.zeros((100_000, 5)), "y": np.arange(100_000) % 3}
    for name, order, other in (
        ("given", Given(np.arange(100_000)), Given(swapped)),
        ("weighted", Weighted(np.ones(100_000)), Weighted(heavier)),
        ("sequential", Sequential(100_000), None),
    ):
        argv = ["--out", str(tmp_path / name)]
        main(replace(tiny.recipe, data=lambda cfg, order=order: Data(table, order=order)), [*argv, "--max-steps", "3"])
        recipe = replace(tiny.recipe, data=lambda cfg, other=other: Data(table, order=other))
        said = ends_with(2, capsys, lambda recipe=recipe, argv=argv: main(recipe, [*argv, "--max-steps", "6"]))
        assert "was made with another order of the examples" in said
    report("L4 another order of the same data", 3, "refused")


def pets(folder):
    """A folder of 60 images, larger than what is kept in memory, and a recipe that learns from it."""
    for cls, i in product(("cat", "dog"), range(30)):
        (folder / cls).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / cls / f"{i}.png")

    def model(cfg, data):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))

    def loss(model, batch, cfg):
        return torch.nn.functional.cross_entropy(model(batch["image"]), batch["label"])

    return replace(
        tiny.recipe, data=lambda cfg: load(str(folder), split_seed=None), model=model, loss=loss, evaluate=None
    )


def vanish(file):
    file.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[:45])


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(("damage", "said"), [(vanish, "No such file"), (cut, "dog/7.png")])
def test_a_file_that_vanishes_or_is_cut_in_the_midst_of_a_run_is_named_or_replaced(
    damage, said, workers, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(columns, "COPIED_BYTES", 0)
    recipe = pets(tmp_path / "pets")
    argv = ["--batch-size", "12", "--workers", workers, "--log-every", "1"]
    hurt = tmp_path / "pets/dog/7.png"
    whole = hurt.read_bytes()

    def after_the_first_step(run, info):
        if info.step == 1:
            damage(hurt)

    recipe = replace(recipe, hooks=lambda cfg: [after_the_first_step])
    with pytest.raises(SystemExit) as ended:  # the second epoch reads it again, if the first had it before the damage
        main(recipe, [*argv, "--max-steps", "12", "--out", str(tmp_path / "stops")])
    assert ended.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"image .*dog/7\.png \(row 57\)", line)
    assert said in line
    hurt.write_bytes(whole)
    main(recipe, [*argv, "--max-steps", "12", "--skip-bad", "1", "--out", str(tmp_path / "goes")])
    assert "warning: example 57 cannot be read: image" in capfd.readouterr().err
    assert list(json.loads((tmp_path / "goes/result.json").read_text())["examples_replaced"]) == ["57"]
    report("L3 a file vanishes or is cut in the midst of a run", 2, "named, or replaced")

"""Hostile and damaged checkpoints: each is refused by one line that names file and rule, or means what was saved.

Rows B1 to B7 of the fault matrix; the attacks are in ``hostile``.
"""

import ctypes
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from faultload import amount, cannot, draw, report
from hostile import (
    BOMBS,
    DAMAGES,
    ENTRY,
    HEADERS_AND_JSON,
    HOOKS,
    INSTEAD,
    MANIFEST,
    MEANING,
    MODEL,
    NAMES,
    OPTIMIZER,
    STATE,
    STEP,
    divided,
    more,
    put,
    relist,
    tensors,
)

from scaletrain import start, train
from scaletrain.checkpoint.export import WEIGHTS, export, load_weights
from scaletrain.checkpoint.format import Manifest, Piece, make_header
from scaletrain.checkpoint.load import check_tensors, load
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.strict import JSON_VALUES, dump
from scaletrain.checkpoint.verify import Checkpoint, newest_whole, open_checkpoint, open_whole, verify
from scaletrain.devices import set_up
from scaletrain.errors import CheckpointError
from scaletrain.run.capture import captured
from scaletrain.run.restore import restore

RUNS_CODE = {"pickle.find_class", "exec", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
EARS = []
"""Lists to which events of Python's audit are added at the moment."""
OUTCOMES = {
    "B2": "each refused by its own rule",
    "B3": "each refused by what it means, not by its hash",
    "B4": "each refused, nothing outside opened",
    "B5": "none unpickled, no marker",
    "B6": "no code run",
}


class Mean:
    """A hook with a state of all kinds."""

    def __init__(self):
        self.steps, self.total, self.big, self.notes = 0, torch.zeros(3), torch.tensor([True, False, True]), ["a", {}]

    def __call__(self, run, info):
        self.steps += 1
        self.total += run.module[2].bias.detach()

    def state_dict(self):
        return {"steps": self.steps, "total": self.total, "big": self.big, "notes": self.notes}

    def load_state_dict(self, state):
        self.steps, self.notes = state["steps"], state["notes"]
        self.total.copy_(state["total"])
        self.big.copy_(state["big"])


recipe = replace(tiny.recipe, hooks=lambda cfg: [Mean()])


def options(folder, **changes):
    return tiny.TinyConfig(**{"out": str(folder), "max_steps": 5, "checkpoint_every": 2} | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkpoint that everything is done to copies of."""
    run = start(recipe, options(tmp_path_factory.mktemp("made") / "run"))
    train(run)
    run.finish()
    return run.folder / "checkpoints" / STEP


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A run that has done nothing yet, into which checkpoints are restored."""
    return start(recipe, options(tmp_path_factory.mktemp("reader") / "run"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the checkpoint, to be attacked."""
    return Path(shutil.copytree(made, tmp_path / "checkpoints" / STEP))


@pytest.fixture(scope="module")
def counted():
    """Tests add what they have injected to the row it belongs to."""
    rows = Counter()
    yield rows
    for row, count in rows.items():
        report(row, count, OUTCOMES[row])


def content(run):
    """All that a checkpoint brings back, to the bit."""
    parts, facts = captured(run)
    bits = {
        (part, name): t.detach().cpu().numpy().tobytes()
        for part, tensors in parts.items()
        for name, t in tensors.items()
    }
    return bits, [facts[name] for name in ("state", "metrics", "ranks", "skipped", "stopping", "optimizer", "hooks")]


@pytest.fixture(scope="module")
def read(reader):
    """What going on from a checkpoint does; returns what ``reader`` has from it."""

    def bring_back(path):
        checkpoint = open_checkpoint(path)
        verify(checkpoint)
        restore(reader, checkpoint)
        return content(reader)

    return bring_back


@contextmanager
def deadline(seconds):
    """Fail in the middle of what hangs."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {seconds} s"))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(read, path, rule):
    """Assert that ``read(path)`` is refused at once, by ``rule``, in one short line that begins with the file."""
    with deadline(5), pytest.raises(CheckpointError) as caught:
        read(path)
    said = str(caught.value)
    assert caught.value.rule == rule, said
    assert re.fullmatch(rf"{re.escape(str(path))}[^\n]*: {rule}: [^\n]+", said), said
    assert len(said) < len(str(path)) + 800


def attempt(read, path):
    """Return what ``read`` does, or the words with which it refuses."""
    try:
        with deadline(5):
            return read(path)
    except CheckpointError as error:
        return str(error)


def test_a_damaged_checkpoint_is_refused_or_means_what_was_saved(made, read, folder):
    rng, outcomes, memory = draw("B1"), Counter(), psutil.Process().memory_info
    whole, good = read(made), {path.name: path.read_bytes() for path in folder.iterdir()}
    names, damages = sorted(good), list(DAMAGES.items())
    assert names == [HOOKS, MANIFEST, MODEL, OPTIMIZER, STATE]
    before = memory().rss
    for i in range(amount(1000)):
        name, (damage, change) = names[i % len(names)], damages[i // len(names) % len(damages)]
        other = rng.choice([other for other in names if other != name])
        a = rng.randrange(len(good[name]))
        b = rng.randint(a + 1, min(a + 64, len(good[name])))
        damaged = change(good[name], good[other], a, b, rng.randint(b, len(good[name])))
        (folder / name).write_bytes(damaged)
        if damaged == good[other]:  # swapped
            (folder / other).write_bytes(good[name])
        found = attempt(read, folder)
        refused = isinstance(found, str)
        assert "\n" not in found if refused else found == whole, f"{damage} of {name}: {found}"
        assert memory().rss < 2 * before
        outcomes["bytes alike" if damaged == good[name] else "refused" if refused else "meant the same"] += 1
        for written in (name, other):
            (folder / written).write_bytes(good[written])
    assert outcomes["refused"] > 0.8 * outcomes.total()
    report("B1", outcomes.total(), ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())))


@pytest.mark.parametrize(("rule", "attack"), HEADERS_AND_JSON)
def test_json_and_headers_are_refused_by_their_own_rule(rule, attack, folder, read, counted):
    attack(folder)
    refused(read, folder, rule)
    counted["B2"] += 1


@pytest.mark.parametrize(("rule", "attack"), MEANING)
def test_what_is_well_hashed_but_not_this_runs_is_refused(rule, attack, folder, read, counted):
    attack(folder)
    refused(read, folder, rule)
    counted["B3"] += 1


@pytest.mark.parametrize("finite", [True, "yes"])
def test_an_unfinished_step_is_read_unless_it_is_of_another_kind(finite, folder, read):
    put(STATE, ("unfinished",), {"epoch": 0.5, "lr": 0.1, "dtypes": ["float32", "float32"]})(folder)
    put(STATE, ("ranks",), [{"loss": 0.0, "asked": "", "step": [0.5, None, finite]}])(folder)
    if finite is True:
        read(folder)
    else:
        refused(read, folder, "state")


@pytest.mark.parametrize("change", [relist, divided((0, 5), (5, 6), (6, 16))], ids=["hashed anew", "divided"])
def test_what_is_written_otherwise_and_means_the_same_is_read(change, made, folder, read):
    change(folder)
    assert (folder / MANIFEST).read_bytes() != (made / MANIFEST).read_bytes()
    assert read(folder) == read(made)


def test_nan_and_infinity_that_were_saved_are_what_is_loaded(folder, read):
    odd = torch.tensor([torch.nan, torch.inf, -0.0])
    tensors(MODEL, more("2.bias", odd))(folder)
    assert read(folder)[0]["model", "2.bias"] == odd.numpy().tobytes()


def test_a_scaler_is_refused_unless_its_values_are_numbers(folder, read, reader, monkeypatch):
    monkeypatch.setattr(reader.gradients, "scaler", torch.amp.GradScaler("cpu"))
    own = reader.gradients.scaler.state_dict()
    put(STATE, ("scaler",), own | {"scale": 128.0})(folder)
    read(folder)
    assert reader.gradients.scaler.state_dict() == own | {"scale": 128.0}
    for odd in ({}, own | {"scale": "1"}, own | {"growth_interval": None}, own | {"more": 1}):
        put(STATE, ("scaler",), odd)(folder)
        refused(read, folder, "state")


def test_what_could_not_be_read_is_not_written():
    for too_much in ([0] * (JSON_VALUES + 1), "a" * (16 << 20), json.loads("[" * 33 + "]" * 33)):
        with pytest.raises(CheckpointError, match=r"^what is saved beside the tensors: (json|size): "):
            dump(too_much)
    with pytest.raises(CheckpointError, match=r"^the header of a file of tensors: json: more than"):
        make_header({f"{i}": (torch.float32, (1,), (0,)) for i in range(JSON_VALUES // 6)})
    assert json.loads(dump({"out": "runs/\udcff\u00fc"})) == {"out": "runs/?\u00fc"}


def test_a_file_that_the_disk_does_not_give_back_is_refused(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("fstat", "read", "readv"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            refused(lambda path: verify(open_checkpoint(path)), folder, "file")


# B4. Outside lies a good checkpoint: whoever followed a link would not even notice.
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify and /proc")


@pytest.fixture
def outside(made, tmp_path):
    """A good checkpoint where nobody has any business; fails the test when a file of it was opened."""
    path = Path(shutil.copytree(made, tmp_path / "outside"))
    system = ctypes.CDLL(None)
    watch = system.inotify_init1(os.O_NONBLOCK)
    assert system.inotify_add_watch(watch, bytes(path), 0x20) > 0  # IN_OPEN
    yield path
    with pytest.raises(BlockingIOError):  # nothing to tell
        os.read(watch, 4096)
    (path / MODEL).read_bytes()
    assert os.read(watch, 4096)
    os.close(watch)


@linux
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[1:30])
def test_a_name_that_leads_elsewhere_is_refused(name, folder, outside, read, counted):
    put(MANIFEST, ("files", name.format(*[MODEL] * 200)), ENTRY)(folder)
    refused(read, folder, "name")
    counted["B4"] += 1


@linux
def test_names_that_differ_in_case_alone_are_refused(folder, outside, read, counted):
    put(MANIFEST, ("files", MODEL.capitalize()), ENTRY)(folder)
    refused(read, folder, "manifest")
    counted["B4"] += 1


@linux
@pytest.mark.parametrize("name", [MANIFEST, STATE, MODEL])
@pytest.mark.parametrize(("rule", "make"), INSTEAD)
def test_what_is_no_plain_file_is_refused(rule, make, name, folder, outside, read, counted):
    (folder / name).unlink()
    try:
        make(folder / name, outside)
    except PermissionError:
        cannot("only root makes devices")
    refused(read, folder, rule)
    counted["B4"] += 1


@linux
def test_a_hard_link_to_other_bytes_is_refused(folder, outside, read, counted):
    other = outside.parent / "other"
    other.write_bytes((folder / MODEL).read_bytes()[:-1] + b"!")
    (folder / MODEL).unlink()
    (folder / MODEL).hardlink_to(other)
    refused(read, folder, "sha256")
    counted["B4"] += 1


@linux
def test_folders_that_are_links_or_files_are_refused(folder, outside, reader, tmp_path, counted):
    steps = folder.parent
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    refused(open_checkpoint, folder, "folder")
    refused(newest_whole, steps, "none")
    folder.unlink()
    folder.write_text("no folder")
    refused(open_checkpoint, folder, "folder")
    shutil.rmtree(steps)
    steps.symlink_to(outside.parent)
    refused(newest_whole, steps, "folder")
    (tmp_path / "circle").symlink_to("circle")
    for path in (tmp_path / "circle", tmp_path / ("a" * 5000)):
        refused(open_whole, path, "missing")
    (tmp_path / WEIGHTS).symlink_to(outside / MODEL)
    refused(lambda path: load_weights(reader.module, path), tmp_path, "file")
    counted["B4"] += 7


# B5 and B6: what Python does is heard by an audit hook, which stays in the process to its end.
@cache
def put_up_ears():
    sys.addaudithook(lambda event, args: [ear.append((event, str(args[0]) if args else "")) for ear in EARS])


@contextmanager
def listening():
    """Yield the list of what Python does meanwhile: event, first argument."""
    put_up_ears()
    EARS.append([])
    try:
        yield EARS[-1]
    finally:
        EARS.clear()


class Payload:
    """What it is unpickled to makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


BESIDE = ("model.pt", "model.bin", "optimizer.pkl", "pytorch_model.bin", "random_states_0.pkl", ".metadata", "state.pt")


@pytest.mark.parametrize("name", [MANIFEST, STATE, MODEL, OPTIMIZER, HOOKS, *BESIDE])
def test_a_pickle_is_never_unpickled(name, made, folder, read, tmp_path, counted):
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    (folder / name).write_bytes(payload)
    with listening() as heard:
        if name in BESIDE:
            assert read(folder) == read(made)
            assert not [what for event, what in heard if event == "open" and what.endswith(name)]
        else:
            if name != MANIFEST:
                relist(folder)
            refused(read, folder, "json" if name.endswith("json") else "header")
        assert "pickle.find_class" not in dict(heard)
        assert not marker.exists()
        pickle.loads(payload)
        assert "pickle.find_class" in dict(heard)
        assert marker.exists()
    counted["B5"] += 1


def save(parts, facts, folder):
    saver = Saver(folder / "checkpoints")
    folder.mkdir()
    saver.save(5, parts, dump(facts))
    saver.wait()


WAYS = {
    "saving": lambda path, run, folder: save(*captured(run), folder),
    "verifying": lambda path, run, folder: verify(open_checkpoint(path)),
    "restoring": lambda path, run, folder: restore(run, open_checkpoint(path)),
    "resuming": lambda path, run, folder: train(start(recipe, options(folder, resume=str(path), max_steps=7))),
    "exporting": lambda path, run, folder: export(open_checkpoint(path), folder.with_suffix(".safetensors")),
    "loading weights": lambda path, run, folder: [load_weights(run.module, p) for p in (path, path.parents[1])],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_code_is_run_by(way, made, reader, tmp_path, counted):
    way(made, reader, tmp_path / "first")  # imports are code as well
    with listening() as heard:
        way(made, reader, tmp_path / "second")
    assert heard
    assert not RUNS_CODE & {event for event, _ in heard}
    counted["B6"] += 1


@pytest.mark.world_size(2)
def test_two_processes_that_save_and_load_unpickle_nothing(shared_path):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    devices, mesh = set_up(), init_device_mesh("cpu", (2,))
    whole = {"plain": torch.arange(4.0), "divided": torch.arange(15.0).reshape(5, 3), "step": torch.tensor(3.0)}
    parts = {"model": whole | {"divided": distribute_tensor(whole["divided"], mesh, [Shard(0)])}}
    saver = Saver(shared_path / "checkpoints", copying=devices.control, writing=devices.checkpoint)
    with listening() as heard:
        saver.save(5, parts, dump({}))
        saver.wait()
        checkpoint, _ = newest_whole(saver.folder)
        again = {name: torch.zeros_like(t) for name, t in parts["model"].items()}
        load(checkpoint, "model", again)
    assert "open" in dict(heard)
    assert not RUNS_CODE - {"exec"} & {event for event, _ in heard}  # what is imported on the way is executed
    assert torch.equal(again["divided"].full_tensor(), whole["divided"])
    assert torch.equal(again["plain"], whole["plain"])


# B7: bombs, read by a process of its own so that its memory can be told.
READ_ALL = """
import json, sys, time
from pathlib import Path
from scaletrain.checkpoint.verify import whole

def kib(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

before = kib("VmRSS")
for path in sys.argv[1:]:
    started = time.process_time()
    said = str(whole(Path(path)))[:1000]
    print(json.dumps([said, time.process_time() - started, (kib("VmHWM") - before) / 1024]))
"""


@linux
def test_bombs_are_refused_soon_and_in_little_memory(made, tmp_path):
    for name, (_, attack) in BOMBS.items():
        attack(Path(shutil.copytree(made, tmp_path / name / STEP)))
    paths = [tmp_path / name / STEP for name in BOMBS]
    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    for (name, (rule, _)), line in zip(BOMBS.items(), ended.stdout.splitlines(), strict=True):
        said, seconds, mebibytes = json.loads(line)
        assert re.fullmatch(rf"{tmp_path / name / STEP}[^\n]*: {rule}: [^\n]+", said), said
        assert seconds < 2, name
        assert mebibytes < 200, name
    report("B7", len(BOMBS), f"each refused within 2 s of computing, {mebibytes:.0f} MiB at most")


@pytest.mark.parametrize("dimension", [0, 1])
def test_thousands_of_pieces_of_a_tensor_are_checked_at_once(dimension):
    at = [(i, 0) if dimension == 0 else (0, i) for i in range(4000)]
    pieces = {f"model-{i:05d}.safetensors": {"w": Piece(torch.int8, (1, 1), at[i], 0, 0)} for i in range(4000)}
    checkpoint = Checkpoint(Path("step"), Manifest(0, 1, {}), {}, pieces, [])
    expected = {"w": ((4000, 1) if dimension == 0 else (1, 4000), torch.int8)}
    with deadline(5):
        check_tensors(checkpoint, "model", expected)
    pieces["model-00007.safetensors"] = pieces["model-03999.safetensors"]
    refused(lambda path: check_tensors(checkpoint, "model", expected), checkpoint.path, "shape")

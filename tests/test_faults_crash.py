"""Kills and power cuts: whatever they leave, what is committed is found whole, and no half passes for one.

Rows C3, C4, C5 and C7 of the fault matrix.
"""

import os
import signal
import sys
import time
import uuid
from itertools import pairwise, product

import pytest
import torch
import tracing
from crashes import Recorder, contents, in_memory, materialize, read_tree, replay, survey
from faultload import ALL, amount, cannot, draw, report
from forked import newest, on_ranks, parts, record, save, save_until_killed, state
from launching import ROOT, TORCHRUN
from safetensors.torch import load_file
from worlds import WORLD, end_processes

from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import FOLDER, MANIFEST, step_folder
from scaletrain.checkpoint.retain import Keep, clear_leftovers
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.verify import newest_whole

RUN = "runs/tiny"
FINE = "0 states with nothing found, 0 torn ones accepted, 0 committed ones lost"


@pytest.fixture
def memory():
    with in_memory() as folder:
        yield folder


# Power cuts: every state that one may leave


class Recorded:
    """A run whose operations on the disk are recorded, with a promise around each save."""

    def __init__(self, root, keep):
        self.files, self.folder, self.keep = Recorder(root), root / RUN, keep
        self.metrics = self.folder / "metrics.jsonl"
        self.committed, self.contents, self.went_on_from = [], {}, -1

    def start(self):
        """Make the run folder, or go on in it as a run does; return the checkpoint to go on from."""
        for folder in (self.folder.parent, self.folder):
            if not folder.exists():
                self.files.mkdir(folder)
        checkpoint, _ = newest_whole(self.folder / FOLDER)
        self.saver = Saver(self.folder / FOLDER, keep=self.keep, files=self.files)
        if checkpoint is not None:
            self.saver.resumed(checkpoint)
            self.went_on_from = checkpoint.step
        if (self.folder / FOLDER).is_dir():
            clear_leftovers(self.files, self.folder / FOLDER)
        self.files.append(self.metrics, b"")
        size = 0 if checkpoint is None else checkpoint.state["metrics"]
        os.truncate(self.metrics, size)
        self.files.note("truncate", self.metrics, at=size)
        return checkpoint

    def save(self, step, best=-1):
        newest_before = max(self.committed, default=-1)
        self.promise(newest_before, {newest_before, best})
        self.files.append(self.metrics, b'{"step": %d}\n' % step)
        told = state(step, metrics=self.metrics.stat().st_size)
        self.saver.save(step, parts(step), told, beside=[self.metrics], best_step=best)
        self.saver.wait()
        assert newest(self.folder) == step
        self.committed.append(step)
        self.contents.setdefault(step, []).append(read_tree(self.folder / FOLDER / step_folder(step)))
        self.promise(step, {best, *self.committed[-self.keep.last :]})

    def promise(self, newest, keeps):
        """From here on ``newest`` or a newer one is found, and what the rules keep is whole."""
        keeps = (
            keeps | {self.went_on_from} | {s for s in self.committed if self.keep.every and s % self.keep.every == 0}
        )
        self.files.promise(newest, keeps & {*self.committed})

    def damage(self, step):
        """Let a bit rot in the newest checkpoint."""
        self.committed.remove(step)
        self.promise(max(self.committed), set())
        folder = self.folder / FOLDER / step_folder(step)
        self.files.damage(folder / "model-00000.safetensors")
        self.contents[step].append(read_tree(folder))

    def judge(self, tree, promise):
        """Whether a promised checkpoint is gone, or a part of one is in its place."""
        for step, versions in self.contents.items():
            place = f"{RUN}/{FOLDER}/{step_folder(step)}"
            found = {path[len(place) + 1 :]: data for path, data in tree.items() if path.startswith(place)}
            if step in promise.keeps and found != versions[0]:
                return "gone"
            if found and found not in versions:
                return "part"
        return ""


def look_at_run(disk):
    """What a run that starts again finds: the newest whole checkpoint, and the metrics that belong to it."""
    checkpoint, _ = newest_whole(disk / RUN / FOLDER)
    if checkpoint is None:
        return None
    content = {name: (checkpoint.path / name).read_bytes() for name in checkpoint.manifest.files}
    content["metrics.jsonl"] = (disk / RUN / "metrics.jsonl").read_bytes()[: checkpoint.state["metrics"]]
    return checkpoint.step, content


def a_long_run(root):
    """Save, keep the last, the best and some for ever, lose one to a rotten bit, go on from before it, replace it."""
    root.mkdir()
    run = Recorded(root, Keep(last=2, every=40))
    assert run.start() is None
    for step, best in ((10, -1), (20, 20), (30, 20), (40, 20), (50, 50), (60, 50)):
        run.save(step, best)
    run.damage(60)
    assert run.start().step == 50
    for step, best in ((60, 50), (70, 50), (80, 80)):
        run.save(step, best)
    return run


def a_short_run(root, best=None):
    """Save three times and keep the last and the ``best`` at each alone."""
    root.mkdir()
    run = Recorded(root, Keep(last=1))
    run.start()
    for step in (10, 20, 30):
        run.save(step, (best or {}).get(step, -1))
    return run


def test_whatever_a_power_cut_leaves_the_newest_committed_checkpoint_is_found_whole(memory):
    run, random, crashed = a_long_run(memory / "disk"), draw("C4"), memory / "crashed"
    log, limit = run.files.log, None if ALL else 18
    assert replay(log).now() == read_tree(memory / "disk"), "the model of the disk has drifted from the disk"
    saved = contents(log, look_at_run, crashed)
    found = survey(log, look_at_run, saved, crashed, lambda disk: disk.some_states(limit, random), also=run.judge)
    assert not found.problems, found.examples
    assert found.states >= 1000
    how = "all states" if ALL else f"at most {limit} states after each operation"
    report("C4 power cut", found.states, f"{how} of 9 saves, {found.cases:,} cases: {FINE}")


def test_an_old_checkpoint_goes_only_after_a_newer_one_is_committed(memory):
    run, folder, removed = a_short_run(memory / "disk", best={10: 10, 20: 10, 30: 30}), f"{RUN}/{FOLDER}", set()
    for number, done in enumerate(run.files.log):
        if done.kind == "rename" and "/.trash-" in done.other:
            removed.add(done.path)
            begin = max(i for i, before in enumerate(run.files.log[:number]) if before.kind == "promise")
            saving = run.files.log[begin:number]
            published = next(i for i, before in enumerate(saving) if before.other.startswith(f"{folder}/step-"))
            assert ("sync", folder) in [before[:2] for before in saving[published:]]
    assert removed == {f"{folder}/{step_folder(step)}" for step in (10, 20)}


def test_what_a_killed_process_left_unsynced_does_not_cost_the_next_one_its_checkpoints(memory):
    first, random, crashed = a_short_run(memory / "disk"), draw("C4 restart"), memory / "crashed"
    log, limit, states = first.files.log, amount(20, 5), 0
    saved = contents(log, look_at_run, crashed)
    made = next(number for number, done in enumerate(log) if done[:2] == ("mkdir", f"{RUN}/{FOLDER}"))
    for killed_after in range(made + 1, len(log), 1 if ALL else 12):
        before = log[:killed_after]
        materialize(replay(before).now(), memory / "disk")
        again = Recorded(memory / "disk", Keep(last=1))
        again.start()
        again.committed = [done.at for done in before if done.kind == "promise" and done.at >= 0][-1:]
        again.save(40)
        found = survey(
            before + again.files.log,
            look_at_run,
            saved | dict([look_at_run(memory / "disk")]),
            crashed,
            lambda disk: disk.some_states(limit, random),
            since=killed_after,
        )
        assert not found.problems, (killed_after, found.examples)
        states += found.states
    report("C4 kill, start again, power cut", states, f"at most {limit} states after each operation: {FINE}")


def test_with_two_ranks_as_well(memory):
    root, random, crashed = memory / "disk", draw("C4 two ranks"), memory / "crashed"
    root.mkdir()
    outcomes = on_ranks(2, record, root, folder=memory)
    assert [code for code, _ in outcomes] == [0, 0]
    log = sorted((operation for _, done in outcomes for operation in done), key=lambda done: done.nanoseconds)
    assert replay(log).now() == read_tree(root)

    def look(disk):
        step = newest(disk / "run")
        return None if step is None else (step, {})

    saved = contents(log, look, crashed)
    assert list(saved) == [10, 20, 30]
    limit = amount(200, 4)
    found = survey(log, look, saved, crashed, lambda disk: disk.some_states(limit, random))
    assert not found.problems, found.examples
    report("C4 power cut, two ranks", found.states, f"at most {limit} states after each operation: {FINE}")


def test_without_any_one_of_its_syncs_a_save_would_not_be_safe(memory):
    run, random, crashed = a_short_run(memory / "disk"), draw("C4 syncs"), memory / "crashed"
    log = run.files.log
    saved = contents(log, look_at_run, crashed)
    syncs = [number for number, operation in enumerate(log) if operation.kind == "sync"]
    for left_out in random.sample(syncs, amount(len(syncs), 6)):
        found = survey(
            log[:left_out] + log[left_out + 1 :],
            look_at_run,
            saved,
            crashed,
            lambda disk: disk.some_states(60, random),
            since=left_out,
            until_first=True,
            also=run.judge,
        )
        assert found.problems, f"{log[left_out][:2]} could be left out, or the search for crash states misses some"
    report("C4 each sync left out", amount(len(syncs), 6), "every one of them is missed")


# What the kernel sees

PLACES = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
SAVING = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from forked import parts, state
from scaletrain.checkpoint.retain import Keep
from scaletrain.checkpoint.saver import Saver

def saves(folder, more, groups=(None, None)):
    saver = Saver(folder / "checkpoints", copying=groups[0], writing=groups[1], keep=Keep(last=1))
    for step in (10, 20, 30):
        saver.save(step, parts(step) | more, state(step), beside=[folder / "metrics.jsonl"])
        saver.wait()

root = Path(sys.argv[1])
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    saves(root / "two ranks", {}, (dist.new_group(), dist.new_group()))
    dist.destroy_process_group()
else:
    saves(root / "one process", {})
    saves(root / "with hooks", {"hooks": {"average": torch.ones(3)}})
"""
OTHERS = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

in_place, rotating = Path(sys.argv[1]) / "in place", Path(sys.argv[1]) / "rotating"
accelerator = Accelerator(
    cpu=True,
    project_config=ProjectConfiguration(project_dir=rotating, automatic_checkpoint_naming=True, total_limit=1),
)
model = torch.nn.Linear(3, 2)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5))
for number in range(3):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"step": number, "model": model.state_dict()}, in_place / "last.pt")
    (in_place / "promises").write_text(str(number))
    accelerator.save_state()
    (rotating / "promises").write_text(str(number))
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What programs that save do to a disk, by the name of the folder that they save to."""
    if why := tracing.why_not():
        cannot(why)
    root, world = tmp_path_factory.mktemp("traced"), uuid.uuid4().hex
    names = ("one process", "with hooks", "two ranks", "in place", "rotating")
    for name in names:
        (root / name).mkdir()
        (root / name / "metrics.jsonl").touch()
    (root / "saving.py").write_text(SAVING)
    (root / "others.py").write_text(OTHERS)
    commands = ((sys.executable, "saving.py"), (*TORCHRUN, "saving.py"), (sys.executable, "others.py"))
    programs = []
    for number, (*command, script) in enumerate(commands):
        trace = root / f"{number}.trace"
        programs.append(tracing.start(trace, *command, root / script, root, **PLACES, **{WORLD: world}))
    try:
        for program in programs:
            said, _ = program.communicate(timeout=100)
            assert program.returncode == 0, said
    finally:
        end_processes(world)
    traces = {"one process": 0, "with hooks": 0, "two ranks": 1, "in place": 2, "rotating": 2}
    return {name: (root / name, tracing.calls(root / f"{traces[name]}.trace", root / name)) for name in names}


@pytest.mark.parametrize("layout", ["one process", "with hooks", "two ranks"])
def test_the_kernel_sees_the_operations_in_the_order_that_is_safe(traced, layout):
    _, calls = traced[layout]
    begins = [number for number, call in enumerate(calls) if call.operation.path.startswith(f"{FOLDER}/.tmp-")]
    begins = [number for number in begins if calls[number].operation.kind == "mkdir"]
    for step, begin, end in zip((10, 20, 30), begins, [*begins[1:], None], strict=True):
        check_save(calls[begin:end], f"{FOLDER}/{step_folder(step)}", f"{FOLDER}/{step_folder(step - 10)}")
    inside = [
        call for call in calls if call.operation.path.startswith(f"{FOLDER}/step-") and "." in call.operation.path
    ]
    assert not inside, "what is published is not touched"
    report(f"C7 system calls, {layout}", len(calls), "3 saves in the order that is safe, each sync done once")


def check_save(calls, final, older):
    """Whether a save, which begins with the making of its folder, came in the order that is safe."""

    def of(kind, path):
        return [call for call in calls if call.operation[:2] == (kind, path)]

    begin, *_ = calls
    draft, trash = begin.operation.path, older.replace("/", "/.trash-")
    manifest = f"{draft}/{MANIFEST}"
    *files, last = [call.operation.path for call in calls if call.operation.kind == "create"]
    assert last == manifest
    for file in files:
        in_order([begin], of("create", file), of("write", file), of("sync", file), of("create", manifest))
    in_order([begin], of("sync", "metrics.jsonl"), of("create", manifest))
    published, *retired = of("sync", FOLDER)
    in_order(
        of("create", manifest), of("write", manifest), of("sync", manifest), of("sync", draft), of("rename", draft)
    )
    in_order(of("rename", draft), [published])
    assert of("rename", draft)[0].operation.other == final
    if retire := of("rename", older):
        assert retire[0].operation.other == trash
        unlinks = [call for call in calls if call.operation.kind == "unlink"]
        assert {os.path.dirname(call.operation.path) for call in unlinks} == {trash}  # noqa: PTH120
        in_order([published], retire, retired, unlinks, of("rmdir", trash))
    syncs = sum(call.operation.kind == "sync" for call in calls)
    assert syncs == len(files) + 4 + len(retire), "files, metrics, manifest, folder, its name, the name of one retired"


def in_order(*groups):
    """Whether each of these was over before the next began; none may be missing."""
    for earlier, later in pairwise(groups):
        assert earlier
        assert later
        assert max(call.ended for call in earlier) < min(call.begun for call in later)


# What others leave: the harness finds it


def look_at_file(folder):
    """What a torch.save onto one file leaves."""
    if not (folder / "last.pt").exists():
        return None
    content = torch.load(folder / "last.pt", weights_only=True)
    return content["step"], {name: tensor.numpy().tobytes() for name, tensor in content["model"].items()}


def look_at_rotation(folder):
    """The newest checkpoint of Accelerate that can be read at all: weights and optimizer, never mind the rest."""
    numbers = [int(path.name.removeprefix("checkpoint_")) for path in (folder / "checkpoints").glob("checkpoint_*")]
    for number in sorted(numbers, reverse=True):
        path = folder / "checkpoints" / f"checkpoint_{number}"
        try:
            tensors = load_file(path / "model.safetensors")
            momenta = torch.load(path / "optimizer.bin", weights_only=True)["state"]
        except Exception:  # its readers raise whatever they stumble over
            continue
        tensors |= {f"momentum {i}": momentum["momentum_buffer"] for i, momentum in momenta.items()}
        return number, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return None


@pytest.mark.parametrize(
    ("name", "look", "what"),
    [
        ("in place", look_at_file, "torch.save onto the file before"),
        ("rotating", look_at_rotation, "Accelerate's save_state with total_limit=1"),
    ],
)
def test_the_same_look_at_ways_of_saving_that_sync_nothing_finds_what_they_lose(traced, memory, name, look, what):
    folder, calls = traced[name]
    log, random = [call.operation for call in calls], draw(f"C5 {name}")
    there = {path: data for path, data in read_tree(folder).items() if path not in ("promises", "metrics.jsonl")}
    assert replay(log).now() == there, "the model of the disk has drifted from the disk"
    saved, limit = contents(log, look, memory / "crashed"), amount(200, 10)
    assert list(saved) == [0, 1, 2]
    # with settle, what was done before the last save returned is on the disk: only what is under way may be lost
    killed = survey(log, look, saved, memory / "crashed", lambda disk: [disk.now()], settle=True)
    cut = survey(log, look, saved, memory / "crashed", lambda disk: disk.some_states(limit, random), settle=True)
    assert killed.problems["nothing"]
    assert cut.problems["nothing"] > killed.problems["nothing"]
    report(
        f"C5 {what}, which by its documentation syncs nothing",
        cut.states,
        f"as expected, nothing readable is left in {killed.problems['nothing']} of {killed.cases} cases of a kill and "
        f"{cut.problems['nothing']:,} of {cut.cases:,} of a power cut, though all that came before is on the disk",
    )


# Killed at each operation


def test_killed_before_or_after_any_operation_a_run_finds_what_was_committed_and_goes_on(memory):
    random, points = draw("C3"), []
    for n in (1, 2):
        (memory / f"{n}").mkdir()
        outcomes = on_ranks(n, save_until_killed, memory / f"{n}", -1, -1, "", folder=memory)
        for rank, (code, (count, error)) in enumerate(outcomes):
            assert (code, error) == (0, "")
            points += product([n], [rank], range(count), ["before", "after"])
    chosen = random.sample(points, amount(len(points), 10))
    for number, (n, victim, at, side) in enumerate(chosen):
        folder, began = memory / f"trial {number}", time.monotonic()
        folder.mkdir()
        outcomes = on_ranks(n, save_until_killed, folder, victim, at, side, folder=memory, timeout=20)
        assert outcomes.pop(victim) == (-signal.SIGKILL, None), (n, victim, at, side)
        for code, (_, error) in outcomes:
            assert (code, bool(error)) == (0, True), "the other rank is told"
        assert time.monotonic() - began < 10
        acknowledged = folder / "acknowledged"
        committed, found = int(acknowledged.read_text()) if acknowledged.exists() else None, newest(folder)
        assert found == committed or found == (committed or 0) + 10, (n, victim, at, side)
        if (folder / FOLDER).is_dir():
            clear_leftovers(Files(), folder / FOLDER)
        save(folder, 30)
        assert newest(folder) == 30
        assert all(path.name.startswith("step-") for path in (folder / FOLDER).iterdir())
    outcome = "what was committed is found, the other rank ends, saving goes on"
    report("C3 killed before or after an operation, one and two ranks", len(chosen), outcome)

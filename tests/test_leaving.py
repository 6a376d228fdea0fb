"""When a run is told to save or to leave, and what it says to those who start it again."""

import errno
import json
import os
import signal
import sys
import threading
from dataclasses import replace

import pytest
import tiny
import torch
import torch.distributed as dist
from faultload import amount, draw, report
from forked import FORKING
from killing import wait_for
from test_checkpoints import (
    Rows,
    assert_same_end,
    checkpoint,
    ends_with,
    leave_during_validation,
    left_after,
    measured_by,
    run_tiny,
    steps_in,
)
from test_tracking import lines_of

from scaletrain import CheckpointError, Data, main, start, train, validate
from scaletrain.checkpoint.export import load_weights
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.verify import open_checkpoint, verify
from scaletrain.cli import main as command
from scaletrain.errors import Preempted
from scaletrain.folder import left_before_restart, record_exit, write_json
from scaletrain.run.restore import _put_together
from scaletrain.tracking import Tracking

# asked to save


def ask_at(step):
    """A hook that sends its own process SIGUSR1 after ``step``."""

    def ask(run, info):
        if info.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)

    return ask


def test_sigusr1_asks_for_one_checkpoint(tmp_path):
    recipe = replace(tiny.recipe, hooks=lambda cfg: [ask_at(7)], data=lambda cfg: Data(tiny.table()))
    main(recipe, ["--max-steps", "20", "--keep-last", "99", "--out", str(tmp_path)])
    assert steps_in(tmp_path) == [9, 20]  # sent with step 8, granted with step 9


def test_rank_0s_clock_asks_as_soon_as_it_may(tmp_path):
    run_tiny(tmp_path, "--checkpoint-minutes", 1e-9, "--keep-last", 99, recipe=measured_by({}))
    assert steps_in(tmp_path) == sorted({*range(2, 21, 2), 5})  # 5 is the best


@pytest.mark.world_size(2)
def test_one_ranks_signal_and_rank_0s_clock_save_on_all_and_another_ranks_clock_does_not(shared_path):
    def ask(run, info):
        if info.step == 4 and run.devices.rank == 1:
            run.signals.save = True  # as its handler does

    def run_with(name, hooks, clocks):
        recipe = replace(tiny.recipe, hooks=lambda cfg: hooks, data=lambda cfg: Data(tiny.table()))
        run = start(recipe, tiny.TinyConfig(max_steps=12, keep_last=99, out=str(shared_path / name)))
        run.requests._save_at += -1e9 if clocks[run.devices.rank] else 0
        train(run)
        dist.barrier()
        return steps_in(shared_path / name)

    assert run_with("signal", [ask], (False, False)) == [6, 12]
    assert run_with("clock of rank 1", [], (False, True)) == [12]
    assert run_with("clock of rank 0", [], (True, False)) == [2, 12]


# beside training


class Held:
    """Files whose writes wait until they are let go."""

    def __init__(self, monkeypatch):
        self.gate, write = threading.Event(), Files.write
        monkeypatch.setattr(Files, "write", lambda files, *args: self.gate.wait(30) and write(files, *args))


def test_training_goes_on_while_a_checkpoint_is_being_written(tmp_path, monkeypatch):
    held = Held(monkeypatch)

    def watch(run, info):
        if info.step == 8:
            wait_for(lambda: list(tmp_path.glob("checkpoints/*")))
            watch.seen = [path.name for path in (tmp_path / "checkpoints").iterdir()]
            held.gate.set()

    recipe = replace(tiny.recipe, hooks=lambda cfg: [ask_at(1), watch], data=lambda cfg: Data(tiny.table()))
    main(recipe, ["--max-steps", "9", "--keep-last", "9", "--out", str(tmp_path)])
    (unfinished,) = watch.seen  # five steps after it was begun
    assert unfinished.startswith(".tmp-step-000000003")
    assert steps_in(tmp_path) == [3, 9]


@pytest.mark.parametrize("told", [True, False])
def test_leaving_and_the_end_wait_for_the_save(told, tmp_path, monkeypatch, capsys):
    held = Held(monkeypatch)

    def hook(run, info):
        if info.step == 4:
            threading.Timer(0.3, held.gate.set).start()
            if told:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = replace(tiny.recipe, hooks=lambda cfg: [hook], data=lambda cfg: Data(tiny.table()))
    argv = ["--max-steps", "6", "--checkpoint-every", "3", "--out", str(tmp_path)]
    if told:
        ends_with(75, capsys, lambda: main(recipe, argv))
    else:
        main(recipe, argv)
    assert steps_in(tmp_path) == [3, 5 if told else 6]
    for step in steps_in(tmp_path):
        verify(open_checkpoint(checkpoint(tmp_path, step)))


@pytest.mark.world_size(2)
def test_a_disk_that_fails_on_one_rank_ends_all_at_the_same_step(shared_path, monkeypatch):
    if dist.is_initialized() or os.environ["RANK"] == "1":

        def fail(files, descriptor):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(Files, "fsync", fail)
    run = start(tiny.recipe, tiny.TinyConfig(max_steps=400, checkpoint_every=3, out=str(shared_path / "run")))
    with pytest.raises(CheckpointError, match=r"disk: Input/output error \(on rank 1\)"):
        train(run)
    reached = torch.tensor([run.state.step, -run.state.step])
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    assert reached[0] == -reached[1] < 400
    assert steps_in(shared_path / "run") == []


# told to leave


class Swapping:
    """A hook that validates with other weights, as an average of them would be, and counts its calls."""

    def __init__(self):
        self.calls, self.told = 0, False

    def __call__(self, run, info):
        self.calls += 1
        if info.step != 5:
            return
        weights = [p.detach().clone() for p in run.module.parameters()]
        with torch.no_grad():
            for p in run.module.parameters():
                p.zero_()
        self.told = True
        validate(run)
        with torch.no_grad():
            for p, weight in zip(run.module.parameters(), weights, strict=True):
                p.copy_(weight)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_told_to_leave_while_a_hook_validates_with_other_weights_it_saves_those_it_trains(tmp_path, capsys):
    hook = Swapping()

    def evaluate(model, batch, cfg):
        if hook.told:
            hook.told = False
            os.kill(os.getpid(), signal.SIGTERM)
        return tiny.evaluate(model, batch, cfg)

    recipe = replace(tiny.recipe, evaluate=evaluate, hooks=lambda cfg: [hook])
    argv = ["--micro-batch-size", "4"]  # several batches to validate
    ends_with(75, capsys, lambda: run_tiny(tmp_path / "run", *argv, recipe=recipe))
    quiet = replace(tiny.recipe, hooks=lambda cfg: [Swapping()])
    run_tiny(tmp_path / "whole", *argv, recipe=quiet)
    run_tiny(tmp_path / "run", *argv, recipe=quiet)
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    saved = [open_checkpoint(checkpoint(tmp_path / name, 20)).state["hooks"] for name in ("whole", "run")]
    assert saved[0] == saved[1] == {"Swapping": {"calls": 20}}


def test_in_float64_no_bit_of_the_unfinished_steps_loss_is_lost(tmp_path, capsys):
    argv = ["--double", "--log-every", "1", "--micro-batch-size", "4"]  # a validation of several batches
    run_tiny(tmp_path / "whole", *argv)
    recipe = leave_during_validation(10)
    ends_with(75, capsys, lambda: run_tiny(tmp_path / "run", *argv, recipe=recipe))
    assert open_checkpoint(checkpoint(tmp_path / "run", 10)).state["unfinished"] is not None
    run_tiny(tmp_path / "run", *argv, recipe=recipe)
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_what_the_last_job_said_gives_way_to_why_this_one_cannot_start(tmp_path, capsys):
    out = tmp_path / "run"
    ends_with(75, capsys, lambda: run_tiny(out, recipe=leave_during_validation(10)))
    assert json.loads((out / "exit.json").read_text())["code"] == 75
    ends_with(2, capsys, lambda: run_tiny(out, "--seed", 3))
    assert json.loads((out / "exit.json").read_text())["code"] == 2
    for path in (out / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    ends_with(3, capsys, lambda: run_tiny(out))
    assert json.loads((out / "exit.json").read_text())["code"] == 3


def test_a_restart_by_another_launch_trains_on(tmp_path, monkeypatch, capsys):
    recipe = leave_during_validation(10)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "monday")
    ends_with(75, capsys, lambda: run_tiny(tmp_path / "run", recipe=recipe))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tuesday")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # its first attempt died before it came to the folder
    assert run_tiny(tmp_path / "run", recipe=recipe).step == 20


def test_a_restart_of_fewer_processes_trains_on_since_a_machine_was_told_to_leave(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "monday")
    monkeypatch.setenv("WORLD_SIZE", "3")
    record_exit(tmp_path, 75, "told to leave")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert left_before_restart(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not left_before_restart(tmp_path)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("newcomer", [0, 1, None])
def test_a_restart_with_a_machine_that_has_just_come_trains_on(newcomer, shared_path, monkeypatch):
    out = shared_path / "run"
    out.mkdir(exist_ok=True)
    if os.environ["RANK"] == "0":
        write_json(out / "environment.json", {})  # a run folder
        record_exit(out, 75, "told to leave")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0" if os.environ["RANK"] == str(newcomer) else "1")
    if newcomer is None:
        with pytest.raises(Preempted):
            start(tiny.recipe, tiny.TinyConfig(max_steps=2, out=str(out)))
    else:
        assert start(tiny.recipe, tiny.TinyConfig(max_steps=2, out=str(out))).state.step == 0


def test_a_run_that_stopped_early_in_a_saved_step_is_done_too(tmp_path, capsys):
    argv = ["--patience", 1, "--checkpoint-every", 1]
    run_tiny(tmp_path / "run", *argv, recipe=measured_by({5: 0.5}))
    before = (tmp_path / "run/metrics.jsonl").stat()
    capsys.readouterr()
    assert run_tiny(tmp_path / "run", *argv, recipe=measured_by({})).step == 11
    assert "is done: val_loss was not better than 0.5000 in 1 validations" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").stat() == before


# killed while it writes what is no checkpoint


def train_two_steps(folder, die_at, answer):
    """In a process of its own, killed at the ``die_at``-th change to the run folder, checkpoints aside."""
    changes, watched = 0, {"open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile", "os.truncate"}

    def count(event, arguments):
        nonlocal changes
        if event in watched and str(arguments[0]).startswith(folder) and "checkpoints" not in str(arguments[0]):
            changes += 1
            if changes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    main(tiny.recipe, ["--max-steps", "2", "--out", folder])
    answer.send(changes)


def changes_to(folder, die_at=0):
    """Train in ``folder`` until killed; return the number of changes, or None where it was killed."""
    mine, theirs = FORKING.Pipe()
    child = FORKING.Process(target=train_two_steps, args=(str(folder), die_at, theirs))
    child.start()
    theirs.close()
    child.join(60)
    assert child.exitcode == (-signal.SIGKILL if die_at else 0)
    return None if die_at else mine.recv()


def test_killed_at_any_change_to_its_folder_the_same_command_goes_on(tmp_path):
    changes = changes_to(tmp_path / "whole")
    assert changes > 20
    moments = sorted(draw("C10 folder").sample(range(1, changes + 1), amount(changes, 6)))
    for moment in moments:
        folder = tmp_path / str(moment)
        changes_to(folder, die_at=moment)
        result = main(tiny.recipe, ["--max-steps", "2", "--out", str(folder)])
        assert result.step == 2
        for name in ("metrics.jsonl", "model.safetensors", "result.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (moment, name)
    report("C10 SIGKILL at each change to the run folder outside of checkpoints", len(moments), "the same end")


# on several processes


class OnlyOnRank0:
    def __init__(self):
        self.seen = None

    def __call__(self, run, info):
        if run.devices.rank == 0:
            self.seen = torch.zeros(3)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.world_size(2)
def test_a_hook_that_keeps_tensors_on_one_rank_alone_is_refused_on_all(shared_path):
    recipe = replace(tiny.recipe, hooks=lambda cfg: [OnlyOnRank0()])
    run = start(recipe, tiny.TinyConfig(max_steps=9, checkpoint_every=2, out=str(shared_path / "run")))
    why = r"hook OnlyOnRank0\.seen is torch\.float32 \(3,\) on rank 0 and missing on rank 1"
    with pytest.raises(CheckpointError, match=why):
        train(run)


@pytest.mark.world_size(3)
def test_with_workers_on_three_processes_a_run_goes_on_with_the_same_bits(shared_path):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(Rows(tiny.table()), tiny.table(53, seed=1)))

    def run_to(step, name, workers):
        run = start(
            recipe, tiny.TinyConfig(max_steps=step, workers=workers, out=str(shared_path / name), validate_every=4)
        )
        train(run)
        return [p.detach().clone() for p in run.module.parameters()]

    whole = run_to(9, "whole", 1)
    run_to(5, "again", 2)
    again = run_to(9, "again", 1)
    assert all(map(torch.equal, whole, again))


def test_a_hooks_tensor_goes_back_to_the_kind_of_device_it_was_on():
    for on, wanted in (("cpu", "cpu"), ("cuda", "meta")):
        state = {"mean": {"__tensor__": "Mean.mean", "on": on}}
        found = _put_together(state, {"Mean.mean": torch.ones(2)}, torch.device("meta"))
        assert found["mean"].device.type == wanted


# what is said


def test_which_newer_checkpoint_was_skipped_is_always_said(tmp_path, capsys):
    run_tiny(tmp_path / "run", "--checkpoint-every", 10, "--keep-last", 9)
    left_after(tmp_path / "run", 20)
    path = next(checkpoint(tmp_path / "run", 20).glob("model*"))
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    run_tiny(tmp_path / "branch", "--resume", tmp_path / "run")
    assert f"warning: skipped a checkpoint: {path}: size" in capsys.readouterr().out
    (tmp_path / "run/model.safetensors").unlink()
    with pytest.warns(UserWarning, match=f"skipped a newer checkpoint: {path}: size"):
        load_weights(tiny.model(tiny.TinyConfig(), None), tmp_path / "run")
    for action in (["show"], ["export"], ["diff"]):
        more = {"export": [str(tmp_path / "out.safetensors")], "diff": [str(tmp_path / "branch")]}.get(action[0], [])
        with pytest.raises(SystemExit):
            command(["ckpt", *action, str(tmp_path / "run"), *more])
        assert f"skipped: {path}: size" in capsys.readouterr().err


def test_what_else_the_last_bits_depend_on_is_said(tmp_path, capsys):
    run_tiny(tmp_path / "run")
    capsys.readouterr()
    run_tiny(tmp_path / "run", "--max-steps", 22, "--threads", 2)
    assert "the same examples and curve, but not the same last bits: threads 1 -> 2" in capsys.readouterr().out


def test_a_checkpoint_that_another_run_committed_meanwhile_is_not_replaced(tmp_path, capsys):
    def meanwhile(run, info):
        if info.step == 3:
            run_tiny(tmp_path / "other", "--max-steps", 4)
            (tmp_path / "other/checkpoints/step-000000004").rename(checkpoint(tmp_path / "run", 4))

    recipe = replace(tiny.recipe, hooks=lambda cfg: [meanwhile])
    argv = ["--checkpoint-every", "2", "--max-steps", "9"]
    said = ends_with(3, capsys, lambda: run_tiny(tmp_path / "run", *argv, recipe=recipe))
    assert "another process works in this folder" in said
    verify(open_checkpoint(checkpoint(tmp_path / "run", 4)))


def test_the_tracker_hears_each_line_once_through_any_number_of_kills(tmp_path):
    heard = []

    class Tracker:
        id = "the-run"
        tracker = None

        def log(self, values, step):
            heard.append((step, *values))

    Tracker.tracker = Tracker

    def process(keep, upto, *, told=True):
        """Log lines after the first ``keep``, then be killed: two lines a step, a loss and a validation."""
        tracking = Tracking(tmp_path, keep=(keep, 0))
        if told:
            tracking._tracker = Tracker()
            tracking._told.begin(Tracker.id, tracking._metrics.count)
        for line in range(keep, upto):
            name = "loss" if line % 2 == 0 else "val_loss"
            tracking.log({name: 1.0}, step=1 + line // 2, epoch=0.0, samples_seen=0)
        tracking.flush()

    process(0, 17)
    process(8, 13)  # killed again before it came to where the first one was
    process(8, 20)
    process(14, 16, told=False)  # --track none
    process(14, 24)
    names = ("loss", "val_loss")
    assert heard == [(1 + line // 2, names[line % 2]) for line in range(24)]
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1 + line // 2 for line in range(24)]

"""Saving on ranks that start in a moment: forked from a process that has imported torch already, joined by gloo.

And the file layers that fail: ``Killing`` ends its process at an operation, ``Failing`` lets an operation fail.
"""

import multiprocessing
import os
import signal
import traceback
import uuid
from datetime import timedelta
from multiprocessing.connection import wait
from time import monotonic
from typing import NamedTuple

import torch
import torch.distributed as dist
from crashes import Recorder, Watched

from scaletrain.checkpoint.load import load
from scaletrain.checkpoint.retain import Keep
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.strict import dump
from scaletrain.checkpoint.verify import newest_whole
from scaletrain.errors import CheckpointError

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["scaletrain.entry", "torch.distributed.checkpoint.default_planner"])


class Killing(Watched):
    """Ends its own process by SIGKILL ``side`` (before or after) operation number ``at``."""

    def __init__(self, at=-1, side="before"):
        self.at, self.side, self.count = at, side, 0

    def before(self, kind, arguments):
        if (self.count, "before") == (self.at, self.side):
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, kind, arguments, result):
        if (self.count, "after") == (self.at, self.side):
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class Failing(Watched):
    """Lets operation number ``at`` fail as ``how`` says, and all after it unless ``once``."""

    def __init__(self):
        self.at, self.how, self.once, self.kinds = -1, None, True, []
        self._path = None

    def arm(self, after, how, *, once):
        """Fail ``after`` more operations: by raising ``how``, or by losing the file ("lose") or its end ("cut")."""
        self.at, self.how, self.once = len(self.kinds) + after, how, once

    def heal(self):
        self.at = -1

    def before(self, kind, arguments):
        number = len(self.kinds)
        self.kinds.append(kind)
        if self.at < 0 or number < self.at or (self.once and number > self.at):
            return
        if self.how == "lose":
            self._path.unlink()
        elif self.how == "cut":
            os.truncate(self._path, self._path.stat().st_size - 1)
        else:
            if kind == "close":
                os.close(*arguments)  # as the system does even where it complains
            raise self.how

    def after(self, kind, arguments, result):
        if kind == "create":
            (self._path,) = arguments


class Injection(NamedTuple):
    """A failure at operation number ``at`` of a save, on rank ``victim``."""

    victim: int
    at: int
    how: Exception | str
    once: bool = True
    first: bool = False
    """Whether it strikes the first save of all, and not one that removes an older checkpoint."""


class Outcome(NamedTuple):
    rule: str
    message: str
    """What the save raised."""
    kept: int | None
    """The step found afterwards."""
    left: list[str]
    """What lay about in the folder then."""
    later: int | None
    """The step found after a save on a disk that works again."""


def parts(step):
    """The tensors of a checkpoint; no two steps have an element in common."""
    return {
        "model": {"weight": torch.arange(6.0).reshape(2, 3) + step, "bias": torch.full((3,), step / 8)},
        "optimizer": {"weight|exp_avg": torch.arange(6.0).reshape(2, 3) - step, "step": torch.tensor(float(step))},
    }


def state(step, **more):
    return dump({"step": step, **more})


def newest(folder):
    """Return the step of the newest whole checkpoint below ``folder``, None without any, and check every bit of it."""
    checkpoint, _ = newest_whole(folder / "checkpoints")
    if checkpoint is None:
        return None
    step = checkpoint.step
    assert checkpoint.state["step"] == step
    for part, tensors in parts(step).items():
        there = {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}
        load(checkpoint, part, there)
        assert all(torch.equal(there[name], tensor) for name, tensor in tensors.items()), f"{part} of step {step}"
    return step


def on_ranks(n, work, *arguments, folder, timeout=60):
    """Run ``work(rank, groups, *arguments)`` on ``n`` ranks; return of each its exit code and what it returned.

    ``groups`` are those for copying and for writing. A rank that has not ended after ``timeout`` seconds is killed,
    and has the exit code None.
    """
    ends, meeting, ranks = monotonic() + timeout, f"{folder}/meeting-{uuid.uuid4().hex}", []
    for rank in range(n):
        receiving, sending = FORKING.Pipe(duplex=False)
        process = FORKING.Process(target=_enter, args=(rank, n, meeting, sending, work, arguments), daemon=True)
        process.start()
        sending.close()
        ranks.append((process, receiving))
    outcomes = []
    for process, receiving in ranks:
        wait([process.sentinel, receiving], max(0, ends - monotonic()))
        said = _received(receiving) if receiving.poll() else None
        process.join(max(0, ends - monotonic()))
        outcomes.append((process.exitcode, said))
        process.kill()
        process.join()
        process.close()
        receiving.close()
    return outcomes


def _received(connection):
    try:
        return connection.recv()
    except EOFError:  # killed before it said anything
        return None


def _enter(rank, n, meeting, connection, work, arguments):
    code = 0
    try:
        torch.set_num_threads(1)
        groups = (None, None)
        if n > 1:
            patience = timedelta(seconds=30)
            dist.init_process_group("gloo", f"file://{meeting}", world_size=n, rank=rank, timeout=patience)
            groups = (dist.new_group(), dist.new_group())
        connection.send(work(rank, groups, *arguments))
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)  # a rank whose peer was killed must not wait for it


def save_until_killed(rank, groups, folder, victim, at, side):
    """Save steps 10 and 20, the second removing the first; return how many operations that took, and the error.

    Rank ``victim`` is killed at its operation ``at``; ``folder / "acknowledged"`` names the last step committed.
    """
    files = Killing(at if rank == victim else -1, side)
    saver = Saver(folder / "checkpoints", copying=groups[0], writing=groups[1], keep=Keep(last=1), files=files)
    try:
        for step in (10, 20):
            saver.save(step, parts(step), state(step))
            saver.wait()
            if rank == 0:
                (folder / "acknowledged").write_text(str(step))
    except RuntimeError as error:  # a lost connection
        return files.count, str(error)
    return files.count, ""


def save_with_failures(rank, groups, folder, injections):
    """For each injection save step 20 while it strikes, then 30 on a sound disk; return an Outcome of each.

    Step 10 is there before, unless the injection strikes the ``first`` save.
    """
    outcomes = []
    for number, injection in enumerate(injections):
        run, files = folder / str(number), Failing()
        if rank == 0:
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text("{}\n")
        saver = Saver(run / "checkpoints", copying=groups[0], writing=groups[1], keep=Keep(last=1), files=files)
        beside = [run / "metrics.jsonl"]
        if not injection.first:
            saver.save(10, parts(10), state(10), beside=beside)
            saver.wait()
        if rank == injection.victim:
            files.arm(injection.at, injection.how, once=injection.once)
        rule, message = "", ""
        try:
            saver.save(20, parts(20), state(20), beside=beside)
            saver.wait()
        except CheckpointError as error:
            rule, message = error.rule, str(error)
        kept = newest(run) if rank == 0 else None
        left = sorted(path.name for path in (run / "checkpoints").glob("*")) if rank == 0 else []
        files.heal()
        saver.save(30, parts(30), state(30), beside=beside)
        saver.wait()
        outcomes.append(Outcome(rule, message, kept, left, newest(run) if rank == 0 else None))
    return outcomes


def operations(rank, groups, folder):
    """Return what kinds of operation the first save makes, and one that removes an older checkpoint."""
    files = Failing()
    saver = Saver(folder / "checkpoints", copying=groups[0], writing=groups[1], keep=Keep(last=1), files=files)
    (folder / "metrics.jsonl").touch()
    kinds = []
    for step in (10, 20):
        before = len(files.kinds)
        saver.save(step, parts(step), state(step), beside=[folder / "metrics.jsonl"])
        saver.wait()
        kinds.append(files.kinds[before:])
    return kinds


def record(rank, groups, root):
    """Save steps 10, 20 and 30, and return what that did to the disk below ``root``."""
    files = Recorder(root)
    if rank == 0:
        files.mkdir(root / "run")
    saver = Saver(root / "run" / "checkpoints", copying=groups[0], writing=groups[1], keep=Keep(last=1), files=files)
    for step in (10, 20, 30):
        saver.save(step, parts(step), state(step))
        saver.wait()
        if rank == 0:
            files.promise(step)
    return files.log


def as_nobody(rank, groups, work, *arguments):
    """Do ``work`` without root's rights; return the CheckpointError that it raises as text."""
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        work(*arguments)
    except CheckpointError as error:
        return str(error)
    return ""


def save(folder, step, files=None):
    """Save one step below ``folder`` and wait for it."""
    saver = Saver(folder / "checkpoints", files=files)
    saver.save(step, parts(step), state(step))
    saver.wait()

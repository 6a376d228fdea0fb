"""When a run hangs: a sign of life of every rank, who it is that all wait for, the stacks, and an end.

Each rank writes what it is busy with into ``heartbeats/`` of the run folder, from a thread of its own, so that it is
there for the others, and for whoever looks later, even when the rank itself no longer is.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from scaletrain.errors import RANK_ENDED_EARLY
from scaletrain.folder import record_exit, short

if TYPE_CHECKING:
    from scaletrain.run import Run

FOLDER = "heartbeats"
AFTER = ("starting", "after the step", "validation", "saving")
PHASES = (*AFTER, "waiting for the others", "reading data", "forward", "backward", "optimizer")
"""What a rank may be busy with from one completed step to the next: of two that hang, the one that is further waits."""
PATIENCE = 6
"""Times the limit that the first step, which compiles, and the end of saving may take."""
BEATS = 10
"""Signs of life within the limit."""
LATE = 3
"""A rank that has missed so many of them is not only slow: it is stopped, or gone."""


class Heartbeat(NamedTuple):
    """What a rank was busy with when it last said so."""

    rank: int
    step: int
    """Steps completed."""
    phase: str
    age: float
    """Seconds since it said so, by the clock of the file system."""

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step + (self.phase not in AFTER)}".replace("the step of step", "step")

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else 0


@contextmanager
def watching(run: Run) -> Iterator[None]:
    """End the run, with the reason and all stacks, when it makes no progress for ``stuck_minutes``."""
    if run.cfg.stuck_minutes is None:
        yield
        return
    watchdog = Watchdog(run, 60 * run.cfg.stuck_minutes)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.done.set()
        watchdog.join(1)  # at once, unless its disk hangs


class Watchdog(threading.Thread):
    """Says that this rank lives, and ends it when nothing has moved for ``limit`` seconds."""

    def __init__(self, run: Run, limit: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.done = threading.Event()
        self._run, self._limit, self._every = run, limit, limit / BEATS
        self._folder = run.folder / FOLDER

    def run(self) -> None:
        """Beat and look, until ``done``."""
        pulse, first = self._run.pulse, self._run.state.step
        seen, since = -1, time.monotonic()
        while not self.done.wait(self._every):
            self._beat()
            now = time.monotonic()
            if pulse.beats != seen:
                seen, since = pulse.beats, now
            slow = pulse.phase == "saving" or self._run.state.step == first
            if now - since > self._limit * (PATIENCE if slow else 1) and not self.done.is_set():
                self._end(now - since)

    def _beat(self) -> None:
        run = self._run
        with suppress(OSError):  # a full disk is no reason to end
            self._folder.mkdir(exist_ok=True)
            draft = self._folder / f".{run.devices.rank}"
            draft.write_text(json.dumps({"step": run.state.step, "phase": run.pulse.phase}))
            draft.replace(self._folder / f"rank-{run.devices.rank:05d}.json")

    def _heartbeats(self) -> list[Heartbeat]:
        found = []
        for rank in range(self._run.devices.world_size):
            path = self._folder / f"rank-{rank:05d}.json"
            try:
                said, written = json.loads(path.read_text()), path.stat().st_mtime
                found.append(Heartbeat(rank, said["step"], said["phase"], written))
            except (OSError, ValueError, KeyError):
                found.append(Heartbeat(rank, -1, "starting", 0.0))
        newest = max(one.age for one in found)
        return [one._replace(age=newest - one.age) for one in found]

    def _end(self, seconds: float) -> None:
        """Dump the stacks; the first rank that lives says who is missed; kill those that cannot end by themselves."""
        run = self._run
        stacks = self._folder / f"stacks-{run.devices.rank:05d}.txt"
        with suppress(OSError), stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._beat()
        time.sleep(min(self._every, 1.0))  # the others look at about the same time
        every = self._heartbeats()
        silent = [one.rank for one in every if one.age > LATE * self._every]
        if run.devices.rank == min(set(range(len(every))) - set(silent), default=run.devices.rank):
            reason = verdict(every, silent, seconds)
            told = f"{reason}; the stacks of the ranks are in {short(self._folder)}; the checkpoints are untouched"
            with suppress(OSError):
                record_exit(run.folder, RANK_ENDED_EARLY, told)
            os.write(2, f"error: {told}\n".encode())
        for rank in silent:  # one that is stopped would hold the launcher until it kills it
            pid, _, host = run.devices.processes[rank].partition(" ")
            if host == platform.node():
                with suppress(OSError, ValueError):
                    os.kill(int(pid), signal.SIGKILL)
        os._exit(RANK_ENDED_EARLY)


def verdict(every: list[Heartbeat], silent: list[int], seconds: float) -> str:
    """Say who is waited for, and in which phase nobody left."""
    still = f"no progress for {seconds:.0f} s"
    if silent:
        last = "; ".join(f"rank {r} was last heard of in {every[r]}" for r in silent)
        return f"{still}: {last}"
    least = min(one.progress for one in every)
    behind = [one for one in every if one.progress == least]
    where = f"in {behind[0]}"
    if len(behind) == len(every):
        who = "the process is" if len(every) == 1 else "all ranks are"
        return f"{still}: {who} {where}"
    return f"{still}: rank {', '.join(str(one.rank) for one in behind)} is {where}, and the others wait for it"

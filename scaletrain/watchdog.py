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
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scaletrain.errors import RANK_ENDED_EARLY
from scaletrain.folder import exit_code, record_exit, short
from scaletrain.misfit import LIBRARIES

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
EXCHANGES = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/")
"""Where the innermost frame lies of a rank that waits for others: a backward pass may."""
POLL_SECONDS = 2.0
"""How often a rank looks whether it has moved: the ranks find a hang within so long of each other."""
LATE = 3
"""A rank that has missed so many of them is not only slow: it is stopped, or gone."""


class Heartbeat(NamedTuple):
    """What a rank was busy with when it last said so."""

    rank: int
    step: int
    """Steps completed."""
    phase: str
    age: float = 0.0
    """Seconds since it said so, by the clock of the file system."""
    where: str = ""
    """The line of the recipe, or of what it calls, that its main thread is in."""
    waits: bool = False
    """Whether that is an exchange with the other ranks."""

    def __str__(self) -> str:
        phase = f"{self.phase} of step {self.step + (self.phase not in AFTER)}".replace("the step of step", "step")
        return f"{phase} ({self.where})" if self.where else phase

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
    watchdog.forget()


class Watchdog(threading.Thread):
    """Says that this rank lives, and ends it when nothing has moved for ``limit`` seconds."""

    def __init__(self, run: Run, limit: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.done = threading.Event()
        self._run, self._limit, self._every = run, limit, limit / BEATS
        self._folder = run.folder / FOLDER
        self._last = -1

    def run(self) -> None:
        """Beat and look, until ``done``."""
        pulse, first = self._run.pulse, self._run.state.step
        seen, since = -1, time.monotonic()
        self._beat()
        wrote = time.monotonic()
        while not self.done.wait(min(self._every, POLL_SECONDS)):
            now = time.monotonic()
            if now - wrote >= self._every:
                self._beat()
                wrote = now
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
            where, waits = main_thread() if run.pulse.beats == self._last else ("", False)
            self._last = run.pulse.beats
            draft.write_text(
                json.dumps({"step": run.state.step, "phase": run.pulse.phase, "where": where, "waits": waits})
            )
            draft.replace(self._folder / f"rank-{run.devices.rank:05d}.json")

    def forget(self) -> None:
        """Remove this rank's sign of life: it ends as it should."""
        (self._folder / f"rank-{self._run.devices.rank:05d}.json").unlink(missing_ok=True)
        with suppress(OSError):  # the last one takes the folder with it
            self._folder.rmdir()

    def _heartbeats(self) -> list[Heartbeat]:
        found = []
        for rank in range(self._run.devices.world_size):
            path = self._folder / f"rank-{rank:05d}.json"
            try:
                said, written = json.loads(path.read_text()), path.stat().st_mtime
                found.append(Heartbeat(rank, **said, age=written))
            except (OSError, ValueError, TypeError):
                found.append(Heartbeat(rank, 0, "starting"))
        newest = max(one.age for one in found)
        return [one._replace(age=newest - one.age) for one in found]

    def _end(self, seconds: float) -> None:
        """Dump the stacks; the first rank that lives says who is missed; kill those that cannot end by themselves."""
        run = self._run
        if (code := exit_code(run.folder)) is not None:  # why the run ends is known, and this only hangs at its end
            os._exit(code and RANK_ENDED_EARLY)
        stacks = self._folder / f"stacks-{run.devices.rank:05d}.txt"
        with suppress(OSError), stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._beat()
        time.sleep(min(self._every, POLL_SECONDS))  # the others look at about the same time
        self._beat()
        every = self._heartbeats()
        silent = [one.rank for one in every if one.age > LATE * self._every]
        speaker = min(set(range(len(every))) - set(silent), default=run.devices.rank)
        deadline = time.monotonic() + (0 if run.devices.rank == speaker else POLL_SECONDS)
        while exit_code(run.folder) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if exit_code(run.folder) is None:
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


def main_thread() -> tuple[str, bool]:
    """Return the line that the main thread is in, outside of libraries, and whether it is an exchange of torch's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = frame is not None and any(part in frame.f_code.co_filename for part in EXCHANGES)
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    if frame is None:
        return "", waits
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}, in {frame.f_code.co_name}", waits


def verdict(every: list[Heartbeat], silent: list[int], seconds: float) -> str:
    """Say who is waited for, and in which phase nobody left."""
    still = f"no progress for {seconds:.0f} s"
    if silent:
        last = "; ".join(f"rank {r} was last heard of in {every[r]}" for r in silent)
        return f"{still}: {last}"
    busy = [one for one in every if not one.waits] or every
    least = min(one.progress for one in busy)
    behind = [one for one in busy if one.progress == least]
    where = f"in {behind[0]}"
    if len(behind) == len(every):
        who = "the process is" if len(every) == 1 else "all ranks are"
        return f"{still}: {who} {where}"
    return f"{still}: rank {', '.join(str(one.rank) for one in behind)} is {where}, and the others wait for it"

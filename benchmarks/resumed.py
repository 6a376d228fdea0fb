"""Run a program of ``benchmarks.same_run`` in fresh processes, and read from its record how it went on."""

import contextlib
import json
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.same_run import PROGRAMS, Job

TIMEOUT_SECONDS = 180
server = multiprocessing.get_context("forkserver")
"""Forks processes from one that has imported everything; nothing of a run is left in the next."""
server.set_forkserver_preload(
    ["benchmarks.same_run", "accelerate", "lightning.pytorch", "transformers.trainer", "scaletrain.build"]
)


def run(program: str, job: Job, *, world_size: int = 1) -> list[int]:
    """Run ``job`` in fresh processes; return their exit codes, negative for a signal."""
    processes = begin(program, job, world_size)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            for other in processes:
                other.kill()
            raise SystemExit(f"{program} hangs: {said(job)}")
    return [process.exitcode or 0 for process in processes]


def begin(program: str, job: Job, world_size: int = 1) -> list[Any]:
    """Start ``job`` in fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job.folder.mkdir(exist_ok=True)
    jobs = [replace(job, rank=rank, world_size=world_size) for rank in range(world_size)]
    processes = [server.Process(target=_work, args=(program, own, port)) for own in jobs]
    for process in processes:
        process.start()
    return processes


def _work(program: str, job: Job, port: int) -> None:
    log = os.open(job.record.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if job.world_size > 1:
        os.environ |= {
            "RANK": str(job.rank), "LOCAL_RANK": str(job.rank), "WORLD_SIZE": str(job.world_size),
            "LOCAL_WORLD_SIZE": str(job.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    PROGRAMS[program](job)


def said(job: Job) -> str:
    """Return the last line that the first process wrote."""
    lines = job.record.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


def messages(told: Connection) -> Iterator[tuple[int, str]]:
    """Yield what a process tells, to its end."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            yield told.recv()


@dataclass
class Told:
    """What the records of a run's processes tell."""

    steps: list[dict[int, dict[str, Any]]]
    """Of each process: its line for each step."""
    loaded: tuple[int, str] | None
    """The step it resumed from, and what its state was then."""

    @classmethod
    def by(cls, job: Job, world_size: int = 1) -> "Told":
        paths = [replace(job, rank=rank).record for rank in range(world_size)]
        lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
        loaded = next(((line["loaded"], line["state"]) for line in lines[0] if "loaded" in line), None)
        return cls([{line["step"]: line for line in own if "step" in line} for own in lines], loaded)


@dataclass
class Compared:
    """A resumed run against the same program's uninterrupted one."""

    resumed_from: int
    first: int = 0
    """The first step that differs in any bit; 0 if none does."""
    losses: tuple[float, float] = (0.0, 0.0)
    """Of that step: uninterrupted and resumed."""
    same_examples: bool = True
    """Whether all steps read the same examples in the same order."""
    weights_apart: float = 0.0
    """Largest difference of a final weight."""

    @property
    def exact(self) -> bool:
        return not self.first and self.weights_apart == 0


def compare(whole: Job, resumed: Job, world_size: int = 1) -> Compared:
    """Compare the steps after the one that ``resumed`` began with, and the final weights."""
    before, after = Told.by(whole, world_size), Told.by(resumed, world_size)
    found = Compared(after.loaded[0] if after.loaded else 0)
    for step in range(found.resumed_from + 1, whole.steps + 1):
        for own, again in zip(before.steps, after.steps, strict=True):
            expected, got = own[step], again[step]
            found.same_examples &= expected["examples"] == got["examples"]
            if not found.first and expected != got:
                found.first = step
                found.losses = (float.fromhex(expected["loss"]), float.fromhex(got["loss"]))
    a, b = (torch.load(job.record.with_suffix(".pt"), weights_only=True) for job in (whole, resumed))
    found.weights_apart = max(float((a[name] - b[name]).abs().max()) for name in a)
    return found

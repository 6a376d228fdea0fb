"""Meet the other processes before anything is built with them: who is missing is named, and nobody waits for ever.

torchrun's agents count their processes themselves. This is for processes that are started by hand, by srun or by
mpirun, where a rank that never comes would leave the others waiting for half an hour, without a word.
"""

import platform
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # exported all the same

from scaletrain.errors import InputError

WAIT_SECONDS = 300
"""How long processes wait for each other at the start, unless SCALETRAIN_WAIT_SECONDS says otherwise."""
OTHERS_SECONDS = 5
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def meet(env: Mapping[str, str]) -> Store | None:
    """Wait until all processes that the environment tells of are there; return what they meet at, to be kept for now.

    Raises InputError where one does not come in time, comes twice, or where the meeting point cannot be had. Every
    process calls it, before its process group is made.
    """
    numbers = ("RANK", "WORLD_SIZE", "MASTER_PORT")
    if "TORCHELASTIC_RUN_ID" in env or dist.is_initialized() or not all(env.get(name) for name in NEEDED):
        return None
    if not all(env[name].isdigit() for name in numbers):
        said = ", ".join(f"{name}={env[name]}" for name in numbers)
        raise InputError(f"{said}: expected whole numbers, set by the launcher")
    rank, world_size, port = (int(env[name]) for name in numbers)
    if world_size == 1:
        return None
    if rank >= world_size:
        _end(rank, f"RANK={rank} is not below WORLD_SIZE={world_size}; the launcher must number ranks from 0")
    seconds = float(env.get("SCALETRAIN_WAIT_SECONDS") or WAIT_SECONDS)
    where = f"{env['MASTER_ADDR']}:{port}"
    store = _open(env["MASTER_ADDR"], port, world_size, rank, seconds)
    if isinstance(store, Exception):
        _end(rank, _unreachable(where, rank, seconds, store))
    try:
        times = store.add(f"met/times/{rank}", 1)
        if times > 1:
            _end(rank, f"rank {rank} was started {times} times (now on {platform.node()}); each process needs its own")
        store.set(f"met/{rank}", platform.node())
        if rank == 0:
            problem = _count(store, world_size, where, seconds)
            store.set("met/problem", problem)
        else:
            store.wait(["met/problem"], timedelta(seconds=seconds + OTHERS_SECONDS))
            problem = store.get("met/problem").decode()
        store.add("met/told", 1)
    except RuntimeError as error:
        _end(rank, f"lost rank 0 at {where} while waiting for all {world_size} ranks ({_first_line(error)})")
    if problem:
        _let_others_hear(store, rank)
        raise InputError(problem)  # rank 0 prints it for all
    return store


def _open(host: str, port: int, world_size: int, rank: int, seconds: float) -> Store | Exception:
    """Open the meeting point on rank 0, connect to it elsewhere; return why not where that cannot be done in time.

    In a thread, since a connection to a program that never answers has no timeout of its own.
    """
    made: list[Store | Exception] = []
    timeout = timedelta(seconds=seconds)

    def make() -> None:
        try:
            made.append(TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True))
        except RuntimeError as error:  # of torch.distributed, all kinds
            made.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return made[0] if made else TimeoutError("what listens there does not answer")


def _count(store: Store, world_size: int, where: str, seconds: float) -> str:
    """Wait for every rank; return which did not come, and who did."""
    try:
        store.wait([f"met/{rank}" for rank in range(world_size)], timedelta(seconds=seconds))
        return ""
    except RuntimeError:
        here = [rank for rank in range(world_size) if store.check([f"met/{rank}"])]
    hosts = ", ".join(sorted({store.get(f"met/{rank}").decode() for rank in here}))
    missing = ", ".join(str(rank) for rank in range(world_size) if rank not in here)
    store.set("met/here", str(len(here)))
    return (
        f"{len(here)} of {world_size} ranks (WORLD_SIZE) came to {where} within {seconds:g} s, from {hosts}; "
        f"missing: {missing}; start them, or make WORLD_SIZE what was started"
    )


def _let_others_hear(store: Store, rank: int) -> None:
    """Keep the meeting point open on rank 0 until all who came have read why they go."""
    deadline = time.monotonic() + OTHERS_SECONDS
    while rank == 0 and store.add("met/told", 0) < int(store.get("met/here")) and time.monotonic() < deadline:
        time.sleep(0.05)


def _unreachable(where: str, rank: int, seconds: float, error: Exception) -> str:
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return (
            f"{where} (MASTER_ADDR:MASTER_PORT) is taken by another program, or by a second rank 0; choose another port"
        )
    what = "cannot be opened by rank 0" if rank == 0 else f"was not opened by rank 0 within {seconds:g} s"
    return f"{where} (MASTER_ADDR:MASTER_PORT) {what}; see whether rank 0 runs there ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _end(rank: int, problem: str) -> NoReturn:
    """Raise InputError, which rank 0 prints for all; another rank speaks for itself where rank 0 may not be there."""
    if rank != 0:
        sys.stderr.write(f"error: rank {rank}: {problem}\n")
        sys.stderr.flush()
    raise InputError(problem)

"""Reading ahead in processes of its own, and what becomes of one that dies or hangs."""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from scaletrain.devices import cores
from scaletrain.errors import InputError
from scaletrain.readers import ColumnReader, Read, Reader, Request
from scaletrain.signals import obey_parent_alone

T = TypeVar("T")
ON_THE_WAY_SECONDS = 2e-3
"""What a batch costs on its way from a worker, and more: 1 ms of 0.5 MB (benchmarks/loading.py)."""
TIMEOUT_SECONDS = 300
"""How long a worker may take for a batch before it is taken for hung."""
BROKEN_PIPE = (ConnectionError, EOFError, FileNotFoundError)
"""What receiving a tensor raises when the worker that sends it, or its socket, is gone."""


def chosen_workers(reader: Reader, asked: int | None, local_world_size: int, size: int) -> int:
    """Return how many processes read for this one: none for data in memory, else those asked for.

    By default up to 4 of the machine's cores, or none where a batch of ``size`` examples is read, as measured here,
    sooner than it comes from another process.
    """
    if isinstance(reader, ColumnReader):
        return 0
    if asked is not None:
        return asked
    spare = max(0, min(4, cores() // local_world_size - 1))
    return spare if spare and _seconds_to_read(reader, size) > ON_THE_WAY_SECONDS else 0


def _seconds_to_read(reader: Reader, size: int) -> float:
    """Return the seconds that a batch of ``size`` takes, or those of its first example if that took long."""
    seconds = 0.0
    for n in (1, size, size):  # the first call opens files
        indices = np.arange(n) % reader.n
        started = time.perf_counter()
        try:
            reader((indices, indices))
        except InputError:  # it will be met again
            return math.inf
        seconds = time.perf_counter() - started
        if seconds > 100 * ON_THE_WAY_SECONDS:
            break
    return seconds


def read_ahead(reader: Reader, requests: Iterable[Request], workers: int, device: torch.device) -> Iterator[Read]:
    """Answer ``requests`` in order, in ``workers`` processes where there are any.

    A worker that dies or hangs is replaced once, with all others: requests say what to read, so nothing is lost.
    Raises InputError for an example that cannot be read, RuntimeError where workers die again.
    """
    if workers == 0:
        yield from map(reader, requests)
        return
    waiting: deque[Request] = deque()
    rest = iter(requests)
    try:
        yield from _answers(reader, rest, waiting, workers, device)
    except (RuntimeError, *BROKEN_PIPE) as error:
        if not worker_is_lost(error):
            raise
        yield from _answers(reader, chain(list(waiting), rest), deque(), workers, device)


class Failure:
    """An InputError on its way from a worker: torch would wrap it into a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Careful:
    """A reader that answers with a Failure where it would raise InputError."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, request: Request) -> Read | Failure:
        try:
            return self.reader(request)
        except InputError as error:
            return Failure(str(error))


def _answers(
    reader: Reader, requests: Iterator[Request], waiting: "deque[Request]", workers: int, device: torch.device
) -> Iterator[Read]:
    """Answer ``requests``; ``waiting`` holds those that have been handed to workers and are not answered yet."""
    for answer in answers_of(_loader(reader, _noted(requests, waiting), workers, device)):
        waiting.popleft()
        yield answer


class _Waiting:
    """While it is entered, a worker that dies raises RuntimeError; at other times that waits until it is entered.

    Torch's own handler of SIGCHLD raises wherever training is when a worker dies, which nobody could mend.
    """

    def __init__(self) -> None:
        self._inside = self._died = False
        self._raise: Any = None

    def install(self) -> None:
        """Take the place of torch's handler, which is there once a first DataLoader has started workers."""
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
            found = signal.getsignal(signal.SIGCHLD)
            if found != self._note:
                self._raise = found
                signal.signal(signal.SIGCHLD, self._note)

    def __enter__(self) -> None:
        self._inside = True
        if self._died:
            self._died = False
            self._note(signal.SIGCHLD, None)

    def __exit__(self, *error: object) -> None:
        self._inside = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._inside:
            self._died = True
        elif callable(self._raise):
            self._raise(number, frame)


_WAITING = _Waiting()


def answers_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers and yield what they read. Raises RuntimeError, here alone, when one of them dies or hangs.

    Raises InputError for a Failure among the answers.
    """
    answers = iter(loader)
    _WAITING.install()
    try:
        while True:
            with _WAITING:
                try:
                    answer = next(answers)
                except StopIteration:
                    return
            if isinstance(answer, Failure):
                raise InputError(answer.message)
            yield answer
    finally:
        if hasattr(answers, "_shutdown_workers"):  # an error's frames keep it, and torch goes on watching its dead
            answers._shutdown_workers()


def worker_is_lost(error: Exception) -> bool:
    """Say so, once, if ``error`` means that a worker died or hung: torch says it, or the pipe to the worker breaks."""
    why = (str(error).splitlines() or [""])[0]
    if isinstance(error, BROKEN_PIPE) and not why.startswith("Caught"):  # torch's word for what a worker raised
        why = "DataLoader worker exited unexpectedly"
    elif not isinstance(error, RuntimeError) or not why.startswith("DataLoader"):
        return False
    sys.stderr.write(f"warning: {why}; the workers are started again, once\n")
    return True


def _noted(requests: Iterator[Request], waiting: "deque[Request]") -> Iterator[Request]:
    for request in requests:
        waiting.append(request)
        yield request


def _loader(reader: Reader, requests: Iterator[Request], workers: int, device: torch.device) -> DataLoader[Any]:
    return DataLoader(
        _Careful(reader),  # type: ignore[arg-type]  # its items are whole batches
        sampler=requests,
        batch_size=None,
        collate_fn=as_is,
        num_workers=workers,
        timeout=TIMEOUT_SECONDS,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # its base seed must not come from the generator that training uses
    )


def leave_signals(worker: int) -> None:
    """Let a worker obey its parent alone."""
    obey_parent_alone()


def as_is(batch: T) -> T:
    """Return ``batch``: it is one already."""
    return batch

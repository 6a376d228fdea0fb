"""Reading ahead in processes of its own, and what becomes of one that dies or hangs."""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from scaletrain.errors import InputError
from scaletrain.readers import ColumnReader, Read, Reader, Request
from scaletrain.signals import obey_parent_alone

T = TypeVar("T")
TIMEOUT_SECONDS = 300
"""How long a worker may take for a batch before it is taken for hung."""


def chosen_workers(reader: Reader, asked: int | None, local_world_size: int) -> int:
    """Return how many processes read for this one: none for data in memory, else up to 4 of the machine's cores."""
    if isinstance(reader, ColumnReader):
        return 0
    return asked if asked is not None else max(0, min(4, (os.cpu_count() or 1) // local_world_size - 1))


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
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # torch's words for a worker that died or hung
            raise
        sys.stderr.write(f"warning: {str(error).splitlines()[0]}; the workers are started again, once\n")
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
    for answer in _loader(reader, _noted(requests, waiting), workers, device):
        waiting.popleft()
        if isinstance(answer, Failure):
            raise InputError(answer.message)
        yield answer


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

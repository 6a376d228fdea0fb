"""From the order of the examples to micro-batches on the device."""

import copy
import hashlib
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from scaletrain.batches import Batch, NamedColumns, tensors_of, to_device
from scaletrain.devices import copies_without_waiting
from scaletrain.errors import InputError
from scaletrain.order import Indices, digest_of
from scaletrain.readers import ColumnReader, Reader, Request
from scaletrain.share import Share, micro_batch_count, part_of, split
from scaletrain.unreadable import Bad
from scaletrain.workers import read_ahead

T = TypeVar("T")
INDEX_BLOCK = 8192
"""Indices computed at a time."""
GATHER_BYTES = 4 << 20
"""Bytes gathered from columns at a time, at least one step's."""


class MicroBatch(NamedTuple):
    """What one forward pass reads on one process."""

    batch: Batch
    counted: int
    """Examples in it that count; 0 where the process repeats an example only to keep step with the others."""


class Loader:
    """The training data of one process: endless lists of micro-batches, one list per optimizer step."""

    state: dict[str, Any] | None = None
    """Where the data stands, beyond the number of examples seen: nowhere else."""

    def __init__(
        self,
        reader: Reader,
        share: Share,
        micro_batches: int,
        *,
        workers: int,
        device: torch.device,
        most_bad: int = 0,
    ) -> None:
        """``most_bad`` examples may be replaced by others because they cannot be read."""
        self.reader, self.share, self.micro_batches = reader, share, micro_batches
        self.workers, self.device, self.most_bad = workers, device, most_bad
        self.waited_seconds = 0.0
        """Time that training has spent waiting for data so far."""
        self.bad: dict[int, str] = {}
        """Why examples could not be read that were replaced: here so far, elsewhere up to the last checkpoint."""
        parts = split(share.size, micro_batches)
        self._counted = [part.stop - part.start for part in parts]
        # a process short of a micro-batch repeats its last example
        self._parts = [part if part.stop > part.start else slice(share.size - 1, share.size) for part in parts]

    @property
    def in_memory(self) -> bool:
        """Whether batches are gathered from memory, where nobody waits for a disk or a worker."""
        return isinstance(self.reader, ColumnReader) and self.reader.in_memory

    @property
    def advice(self) -> str:
        """What to change when training waits for data."""
        if isinstance(self.reader, ColumnReader):
            return "put the memory maps on a faster disk, or into memory"
        return (
            f"--workers {2 * self.workers or 2} reads ahead in more processes (now {self.workers}), and data that is "
            "read many rows at a time (__getitems__, columns) is read faster"
        )

    @property
    def examples(self) -> int:
        """Number of examples in an epoch."""
        return self.share.order.n

    def order_hash(self) -> str:
        """Hash which example is read where."""
        return hashlib.sha256(digest_of(self.share.order).encode()).hexdigest()

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """Yield each step's micro-batches, beginning with the step whose first position is ``first``."""
        found = self._from_columns(self.reader, first) if isinstance(self.reader, ColumnReader) else self._read(first)
        while True:
            started = time.perf_counter()
            micro_batches = next(found)
            self.waited_seconds += time.perf_counter() - started
            yield micro_batches

    def first(self) -> list[MicroBatch]:
        """Return the first step's micro-batches, read in this process."""
        here = Loader(
            self.reader, self.share, self.micro_batches, workers=0, device=self.device, most_bad=self.reader.n
        )
        return next(here.steps(0))

    def _from_columns(self, reader: ColumnReader, first: int) -> Iterator[list[MicroBatch]]:
        """Gather and move several steps at once, then cut: a call on a few rows costs as much as on hundreds.

        The first step comes alone, so that training begins before much is read.
        """
        size, names = self.share.size, list(reader.columns)
        steps, most = 1, min(INDEX_BLOCK, GATHER_BYTES // max(1, reader.row_bytes)) // size or 1
        whole = self.micro_batches == 1
        while True:
            positions, indices = self.share.block(first, steps)
            block = reader((positions.ravel(), indices.ravel())).batch
            if self.device.type == "cuda" and reader.device.type == "cpu":
                block = {name: column.pin_memory() for name, column in block.items()}  # its copy is not waited for
            block = to_device(block, self.device)
            columns = [column.view(steps, size, *column.shape[1:]).unbind() for column in block.values()]
            for rows in zip(*columns, strict=True):
                batch = NamedColumns(zip(names, rows, strict=True))
                yield [MicroBatch(batch, size)] if whole else self._cut(batch)
            first += steps * self.share.batch_size
            steps = min(2 * steps, most)

    def _cut(self, batch: NamedColumns) -> list[MicroBatch]:
        return [
            MicroBatch(
                NamedColumns({n: rows[part] if counted else rows[part].clone() for n, rows in batch.items()}), counted
            )
            for part, counted in zip(self._parts, self._counted, strict=True)
        ]

    def _read(self, first: int) -> Iterator[list[MicroBatch]]:
        answers = read_ahead(self.reader, self._requests(first), self.workers, self.device)
        batches = copied_ahead(answers, self.device)
        while True:
            yield [MicroBatch(self._noted(*next(batches)), counted) for counted in self._counted]

    def _noted(self, batch: Batch, replaced: tuple[Bad, ...]) -> Batch:
        """Note which examples were replaced; raise InputError when they become too many."""
        for bad in replaced:
            if bad.example not in self.bad:
                self.bad[bad.example] = bad.reason
                told = f"warning: example {bad.example} cannot be read: {bad.reason}"
                sys.stderr.write(f"{told}; example {bad.replaced_by} takes its place\n")
        if self.most_bad and len(self.bad) > self.most_bad:
            example, reason = next(reversed(self.bad.items()))
            raise InputError(
                f"example {example} cannot be read: {reason}; --skip-bad allows {self.most_bad}, and it is number "
                f"{len(self.bad)}; mend some, or allow more to go on"
            )
        return batch

    def _requests(self, first: int) -> Iterator[Request]:
        steps = INDEX_BLOCK // self.share.size or 1
        while True:
            for positions, indices in zip(*self.share.block(first, steps), strict=True):
                for part in self._parts:
                    yield positions[part], indices[part]
            first += steps * self.share.batch_size


class HeldOut:
    """The part of a validation or test split that one process measures: every example on exactly one process.

    Iterating gives the same number of micro-batches on every process; one that has run out repeats an example
    with count 0.
    """

    def __init__(
        self, reader: Reader, batch_size: int, rank: int, world_size: int, *, workers: int, device: torch.device
    ) -> None:
        self.reader, self.batch_size, self.workers, self.device = reader, batch_size, workers, device
        self.part = part_of(reader.n, world_size, rank)
        self.batches = micro_batch_count(reader.n, world_size, batch_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        answers: Iterator[tuple[Batch, Any]]
        if isinstance(self.reader, ColumnReader) and self.reader.can_cut:
            answers = ((batch, ()) for batch in self._cut(self.reader))
        else:
            requests = ((indices, indices) for indices in map(self._indices, range(self.batches)))
            answers = read_ahead(self.reader, requests, self.workers, self.device)
        for k, (batch, _) in enumerate(copied_ahead(answers, self.device)):
            counted = min(self.batch_size, max(0, self.part.stop - self.part.start - k * self.batch_size))
            yield MicroBatch(batch, counted)

    def _cut(self, reader: ColumnReader) -> Iterator[Batch]:
        own = -(-(self.part.stop - self.part.start) // self.batch_size)
        yield from reader.cut(self.part, self.batch_size)
        for k in range(own, self.batches):
            yield reader((self._indices(k), self._indices(k))).batch

    def first(self) -> MicroBatch:
        """Return the first micro-batch, read in this process."""
        here = copy.copy(self)
        here.workers, here.batches = 0, 1
        return next(iter(here))

    def _indices(self, k: int) -> Indices:
        """Return what the ``k``-th micro-batch reads: an example of another process where there are no more."""
        start = self.part.start + k * self.batch_size
        stop = min(start + self.batch_size, self.part.stop)
        return np.arange(start, stop) if start < stop else np.array([0])


def copied_ahead(found: Iterator[tuple[Batch, T]], device: torch.device) -> Iterator[tuple[Batch, T]]:
    """Move the first of each pair to the device; on CUDA one is copied while the one before it computes."""
    if not copies_without_waiting(device.type):
        yield from ((to_device(batch, device), rest) for batch, rest in found)
        return
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(pair: tuple[Batch, T]) -> tuple[Batch, T, torch.cuda.Event]:
        with torch.cuda.stream(beside):
            return to_device(pair[0], device), pair[1], beside.record_event()

    for copying in one_ahead(map(copy, found)):
        yield _handed_over(*copying)


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield ``items``, each once the next one has been taken too; what taking one raises is raised in its turn.

    The first is yielded at once, so that training begins before much is read.
    """
    yield from islice(items, 1)
    waiting = list(islice(items, 1))
    while waiting:
        following, held = [], None
        try:
            following = list(islice(items, 1))
        except Exception as error:
            held = error
        yield waiting[0]
        if held is not None:
            raise held
        waiting = following


def _handed_over(batch: Batch, rest: T, copied: torch.cuda.Event) -> tuple[Batch, T]:
    """Let the stream that computes wait for the copy, and the memory be kept until it has used it."""
    computing = torch.cuda.current_stream()
    computing.wait_event(copied)
    for tensor in tensors_of(batch):
        tensor.record_stream(computing)
    return batch, rest

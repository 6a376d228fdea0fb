"""From the order of the examples to micro-batches on the device."""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from scaletrain.devices import copies_without_waiting
from scaletrain.errors import InputError
from scaletrain.order import Indices, Order, Share, micro_batch_count, seed_for, split
from scaletrain.recipe import Batch, Columns, Part
from scaletrain.signals import obey_parent_alone

T = TypeVar("T")
Request = tuple[Indices, Indices]
"""Positions in the stream, which seed what is random, and the examples to read there."""

Collate = Callable[[list[Any]], Batch]

WORKER_TIMEOUT_SECONDS = 300
INDEX_BLOCK = 8192
"""Indices computed at a time."""
GATHER_BYTES = 4 << 20
"""Bytes gathered from columns at a time, at least one step's."""


class NamedColumns(dict[str, Any]):
    """A batch of named columns that says what it has when asked for what it lacks."""

    def __missing__(self, name: str) -> Any:
        raise InputError(f"the batch has no column '{name}'; its columns are {', '.join(map(repr, self))}")


class MicroBatch(NamedTuple):
    """What one forward pass reads on one process."""

    batch: Batch
    counted: int
    """Examples in it that count; 0 where the process repeats an example only to keep step with the others."""


class ColumnReader:
    """Read batches from columns in memory, or mapped into it: one gather per column."""

    def __init__(self, columns: Columns, rows: Order | None = None, n: int | None = None) -> None:
        self.columns, self.rows = columns, rows
        self.n = len(next(iter(columns.values()))) if n is None else n
        self.row_bytes = sum(column[0].nbytes for column in columns.values())

    def __call__(self, request: Request) -> Batch:
        indices = torch.from_numpy(request[1] if self.rows is None else self.rows(request[1]))
        return NamedColumns({name: column.index_select(0, indices) for name, column in self.columns.items()})


class BatchReader:
    """Read batches from a map-style dataset that takes many indices at once: ``dataset.__getitems__(indices)``.

    It returns a dict of columns, used as it is, or a list of examples. Nothing in it may be random: which examples
    are read together depends on the number of processes. What is random belongs into ``__getitem__`` or ``augment``.
    """

    def __init__(
        self, dataset: Any, collate: Collate | None, rows: Order | None, n: int, *, double: bool = False
    ) -> None:
        self.dataset, self.collate, self.rows, self.n, self.double = dataset, collate, rows, n, double
        self._checked = False

    def __call__(self, request: Request) -> Batch:
        indices = request[1] if self.rows is None else self.rows(request[1])
        found = self._first(indices) if not self._checked else self.dataset.__getitems__(indices.tolist())
        if self.collate is not None and isinstance(found, Mapping):
            found = [{name: column[i] for name, column in found.items()} for i in range(len(indices))]
        if isinstance(found, list):
            found = (self.collate or default_collate)(found)
        return found if self.double else _narrow(found)

    __getitem__ = __call__  # DataLoader asks this way

    def _first(self, indices: Indices) -> Any:
        before = _random_states()
        found = self.dataset.__getitems__(indices.tolist())
        if _random_states() != before:
            raise InputError(
                f"{type(self.dataset).__name__}.__getitems__ draws random numbers, so that its examples would depend on "
                "the number of processes; draw them in __getitem__ (without __getitems__), or in the recipe's augment"
            )
        self._checked = True
        return found


class ExampleReader:
    """Read batches from a map-style dataset example by example.

    What is random in reading an example (torch, NumPy's and Python's global generators) depends on the seed
    and the example's position alone, so neither workers nor processes change it.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate | None,
        seed: int,
        rows: Order | None = None,
        n: int | None = None,
        *,
        double: bool = False,
    ) -> None:
        self.dataset, self.collate, self.seed, self.double = dataset, collate or default_collate, seed, double
        self.rows, self.n = rows, len(dataset) if n is None else n

    def __call__(self, request: Request) -> Batch:
        positions, indices = request
        indices = indices if self.rows is None else self.rows(indices)
        batch = self.collate([self._example(int(p), int(i)) for p, i in zip(positions, indices, strict=True)])
        return batch if self.double else _narrow(batch)

    __getitem__ = __call__  # DataLoader asks this way

    def _example(self, position: int, index: int) -> Any:
        seed = seed_for(self.seed, 2, position)
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        return self.dataset[index]


Reader = ColumnReader | BatchReader | ExampleReader


class Loader:
    """The training data of one process: endless lists of micro-batches, one list per optimizer step."""

    def __init__(self, reader: Reader, share: Share, micro_batches: int, *, workers: int, device: torch.device) -> None:
        self.reader, self.share, self.micro_batches = reader, share, micro_batches
        self.workers, self.device = workers, device
        parts = split(share.size, micro_batches)
        self._counted = [part.stop - part.start for part in parts]
        # a process short of a micro-batch repeats its last example
        self._parts = [part if part.stop > part.start else slice(share.size - 1, share.size) for part in parts]

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """Yield each step's micro-batches, beginning with the step whose first position is ``first``."""
        return self._from_columns(self.reader, first) if isinstance(self.reader, ColumnReader) else self._read(first)

    def first(self) -> list[MicroBatch]:
        """Return the first step's micro-batches, read in this process."""
        here = Loader(self.reader, self.share, self.micro_batches, workers=0, device=self.device)
        return next(here.steps(0))

    def _from_columns(self, reader: ColumnReader, first: int) -> Iterator[list[MicroBatch]]:
        """Gather and move several steps at once, then cut: a call on a few rows costs as much as on hundreds."""
        size, names = self.share.size, list(reader.columns)
        steps = min(INDEX_BLOCK, GATHER_BYTES // max(1, reader.row_bytes)) // size or 1
        whole = self.micro_batches == 1
        while True:
            positions, indices = self.share.block(first, steps)
            block = to_device(reader((positions.ravel(), indices.ravel())), self.device)
            columns = [column.view(steps, size, *column.shape[1:]).unbind() for column in block.values()]
            for rows in zip(*columns, strict=True):
                batch = NamedColumns(zip(names, rows, strict=True))
                yield [MicroBatch(batch, size)] if whole else self._cut(batch)
            first += steps * self.share.batch_size

    def _cut(self, batch: NamedColumns) -> list[MicroBatch]:
        return [
            MicroBatch(
                NamedColumns({n: rows[part] if counted else rows[part].clone() for n, rows in batch.items()}), counted
            )
            for part, counted in zip(self._parts, self._counted, strict=True)
        ]

    def _read(self, first: int) -> Iterator[list[MicroBatch]]:
        batches = read_ahead(self.reader, self._requests(first), self.workers, self.device)
        while True:
            yield [MicroBatch(to_device(next(batches), self.device), counted) for counted in self._counted]

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
        self.part = split(reader.n, world_size)[rank]
        self.batches = micro_batch_count(reader.n, world_size, batch_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        starts = [self.part.start + k * self.batch_size for k in range(self.batches)]
        ranges = [np.arange(start, min(start + self.batch_size, self.part.stop)) for start in starts]
        wanted = [indices if len(indices) else np.array([0]) for indices in ranges]
        batches = read_ahead(self.reader, ((indices, indices) for indices in wanted), self.workers, self.device)
        for batch, indices in zip(batches, ranges, strict=True):
            yield MicroBatch(to_device(batch, self.device), len(indices))


def read_ahead(reader: Reader, requests: Iterator[Request], workers: int, device: torch.device) -> Iterator[Batch]:
    """Answer ``requests`` in order, in ``workers`` processes where there are any."""
    if workers == 0 or isinstance(reader, ColumnReader):
        return map(reader, requests)
    loader: DataLoader[Batch] = DataLoader(
        reader,  # type: ignore[arg-type]  # its items are whole batches
        sampler=requests,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        timeout=WORKER_TIMEOUT_SECONDS,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_training,
        generator=torch.Generator(),  # its base seed must not come from the generator that training uses
    )
    return iter(loader)


def chosen_workers(reader: Reader, asked: int | None, local_world_size: int) -> int:
    """Return how many processes read for this one: none for data in memory, else up to 4 of the machine's cores."""
    if isinstance(reader, ColumnReader):
        return 0
    return asked if asked is not None else max(0, min(4, (os.cpu_count() or 1) // local_world_size - 1))


def make_reader(examples: Any, collate: Collate | None, seed: int, *, double: bool) -> Reader:
    """Choose how ``examples`` are read; float64 columns become float32 unless the model is ``double``."""
    n = len(examples)
    whole, rows = (examples.whole, examples.rows) if isinstance(examples, Part) else (examples, None)
    if isinstance(whole, Mapping):
        if collate is not None:
            raise InputError("collate is for data read example by example, but the data is columns; leave it out")
        n = n if rows is not None else len(next(iter(whole.values())))
        return ColumnReader(dict(whole) if double else _narrow(whole), rows, n)
    if hasattr(whole, "__getitems__"):
        return BatchReader(whole, collate, rows, n, double=double)
    return ExampleReader(whole, collate, seed, rows, n, double=double)


def length(batch: Batch) -> int:
    """Return the number of examples: the first dimension of the first leaf."""
    leaf = _first_tensor(batch)
    if leaf is None or leaf.ndim == 0:
        raise InputError(
            f"a batch is a {type(batch).__name__}; it must hold tensors with one row an example, in a dict or tuple"
        )
    return len(leaf)


def _first_tensor(batch: Batch) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    leaves = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((found for found in map(_first_tensor, leaves) if found is not None), None)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a dict, tuple, list or tensor; from pinned memory the copy overlaps with computing on CUDA."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=copies_without_waiting(device.type))
    if isinstance(batch, Mapping):
        return NamedColumns({name: to_device(leaf, device) for name, leaf in batch.items()})
    if isinstance(batch, tuple | list):
        moved = [to_device(leaf, device) for leaf in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _narrow(batch: Batch) -> Batch:
    """Turn float64 into float32, which is what models compute in, and name the columns of a dict."""
    if isinstance(batch, Tensor):
        return batch.float() if batch.dtype == torch.float64 else batch
    if isinstance(batch, Mapping):
        return NamedColumns({name: _narrow(leaf) for name, leaf in batch.items()})
    if isinstance(batch, tuple | list):
        narrow = [_narrow(leaf) for leaf in batch]
        return type(batch)(*narrow) if hasattr(batch, "_fields") else type(batch)(narrow)
    return batch


def _random_states() -> tuple[Any, ...]:
    return torch.default_generator.get_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())


def _leave_signals_to_training(worker: int) -> None:
    obey_parent_alone()


def _as_is(batch: T) -> T:
    return batch

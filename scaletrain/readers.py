"""From indices to a batch: one gather per column, many rows of a dataset at once, or example by example."""

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaletrain.batches import Batch, NamedColumns, narrow, to_device
from scaletrain.data import MAPPED, Columns, Part, count
from scaletrain.errors import InputError
from scaletrain.order import Indices, Order
from scaletrain.permutation import seed_for
from scaletrain.randomness import drew, random_states, seed_all, set_random_states
from scaletrain.unreadable import Bad, Collate, collated, readable, reason_of, shown

Request = tuple[Indices, Indices]
"""Positions in the stream, which seed what is random, and the examples to read there."""
PAGES_BYTES, KEPT_BYTES = 16 * 4096, 256 << 20
"""What the kernel maps around a row that is read, and how much of that is kept."""
CUT = 256
"""Batches that are cut at a time."""


class Read(NamedTuple):
    """What a reader returns: a batch, and which examples of it are replacements."""

    batch: Batch
    bad: tuple[Bad, ...] = ()


class ColumnReader:
    """Read batches from columns in memory, or mapped into it: one gather per column."""

    def __init__(
        self, columns: Columns, rows: Order | None = None, n: int | None = None, *, double: bool = False
    ) -> None:
        """float64 becomes float32 unless ``double``, and labels int64, a batch at a time: a map stays a map."""
        self.columns, self.rows = columns, rows
        self._kinds = {name: _kind(name, column, double) for name, column in columns.items()}
        large = [column for column in columns.values() if column.nbytes > KEPT_BYTES]
        self._maps = [getattr(column, MAPPED) for column in large if hasattr(column, MAPPED)]
        self._touched_bytes = 0
        self.n = len(next(iter(columns.values()))) if n is None else n
        self.row_bytes = sum(column[0].nbytes for column in columns.values()) + PAGES_BYTES * len(self._maps)

    def __call__(self, request: Request) -> Read:
        indices = torch.from_numpy(request[1] if self.rows is None else self.rows(request[1]))
        if self._maps:
            self._let_go(len(indices))
        if self.device.type == "cuda":
            indices = indices.pin_memory()  # its copy is not waited for
        indices = to_device(indices, self.device)
        found = {name: column.index_select(0, indices) for name, column in self.columns.items()}
        return Read(NamedColumns({name: column.to(self._kinds[name]) for name, column in found.items()}))

    @property
    def can_cut(self) -> bool:
        """Whether rows that follow one another lie so in memory."""
        return self.rows is None and self.in_memory

    def cut(self, part: slice, size: int) -> Iterator[NamedColumns]:
        """Yield the rows of ``part`` in batches of ``size`` rows, the last may have fewer. They are views: no copy.

        Raises InputError where somebody has written into one.
        """
        names, versions = list(self.columns), [column._version for column in self.columns.values()]
        as_they_are = all(column.dtype == self._kinds[name] for name, column in self.columns.items())
        for start in range(part.start, part.stop, CUT * size):
            stop = min(part.stop, start + CUT * size)
            for rows in zip(*(torch.split(column[start:stop], size) for column in self.columns.values()), strict=True):
                batch = NamedColumns(zip(names, rows, strict=True))
                yield batch if as_they_are else NamedColumns((n, c.to(self._kinds[n])) for n, c in batch.items())
                if [column._version for column in self.columns.values()] != versions:
                    raise InputError("evaluate has written into its batch, which is the data; work on a clone() of it")

    @property
    def device(self) -> torch.device:
        """Where the columns are, and batches come from."""
        return next(iter(self.columns.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of the columns, whichever rows are read."""
        return sum(column.nbytes for column in self.columns.values())

    @property
    def in_memory(self) -> bool:
        """Whether nobody waits for a disk: the columns are no large memory maps."""
        return not self._maps

    def move_to(self, device: torch.device) -> None:
        """Keep the columns on ``device``."""
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        self._maps = []  # the copies are in memory

    def _let_go(self, rows: int) -> None:
        """Give the pages of memory maps back now and then: each row read keeps 16 of them, though nobody wants them.

        What has been read stays in the system's cache as long as there is room.
        """
        self._touched_bytes += rows * self.row_bytes
        if self._touched_bytes > KEPT_BYTES:
            self._touched_bytes = 0
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def _kind(name: str, column: Tensor, double: bool) -> torch.dtype:
    if column.dtype == torch.float64 and not double:
        return torch.float32
    whole = not column.is_floating_point() and not column.is_complex() and column.dtype != torch.bool
    return torch.int64 if name == "label" and whole else column.dtype


@dataclass(eq=False)
class DatasetReader:
    """Read batches from a map-style dataset.

    Example by example, what is random in reading one (torch, NumPy's and Python's global generators) depends on the
    seed and the example's position alone, so neither workers nor processes change it. With ``at_once`` the dataset is
    asked for many indices, ``dataset.__getitems__(indices)``, and returns a dict of columns or a list of examples.
    Nothing may be random there: which examples are read together depends on the number of processes.
    """

    dataset: Any
    collate: Collate | None = None
    rows: Order | None = None
    n: int = 0
    """Examples; by default all of the dataset."""
    seed: int = 0
    at_once: bool = False
    double: bool = False
    instead: Order | None = None
    """What shows another example in the place of one that cannot be read; without it such a one raises."""
    _checked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.n = self.n or len(self.dataset)

    def __call__(self, request: Request) -> Read:
        bad: list[Bad] = []
        positions, indices = request
        if self.at_once:
            found, indices = self._together(positions, indices, bad)
        else:
            found = self._each(self._one, positions, indices, bad)
        if self.collate is not None and isinstance(found, Mapping):
            found = [{name: column[i] for name, column in found.items()} for i in range(len(indices))]
        if isinstance(found, list):
            found = collated(self.collate, found, indices)
        return Read(found if self.double else narrow(found), tuple(bad))

    def _each(self, read: Callable[[int, int], Any], positions: Indices, indices: Indices, bad: list[Bad]) -> list[Any]:
        pairs = zip(positions.tolist(), indices.tolist(), strict=True)
        return [readable(read, *pair, bad, instead=self.instead, seed=self.seed) for pair in pairs]

    def _one(self, position: int, index: int) -> Any:
        seed_all(seed_for(self.seed, 2, position))
        return self.dataset[index if self.rows is None else int(self.rows(np.array([index]))[0])]

    def _together(self, positions: Indices, indices: Indices, bad: list[Bad]) -> tuple[Any, Indices]:
        """Read at once; where that fails one by one, to name the one that cannot be read or to replace it."""
        try:
            return self._many(indices), indices
        except DrawnError:
            raise
        except Exception:  # met again below, by the example that raises it
            indices = np.array(self._each(self._alone, positions, indices, bad))
        try:
            return self._many(indices), indices
        except Exception as error:
            raise InputError(f"{shown(indices)} cannot be read together: {reason_of(error)}") from error

    def _alone(self, position: int, index: int) -> int:
        self._many(np.array([index]))
        return index

    def _many(self, indices: Indices) -> Any:
        rows = (indices if self.rows is None else self.rows(indices)).tolist()
        if self._checked:
            return self.dataset.__getitems__(rows)
        before = random_states()
        found = self.dataset.__getitems__(rows)
        if drew(before):
            raise DrawnError(
                f"{type(self.dataset).__name__}.__getitems__ draws random numbers, so its examples would depend on the "
                "number of processes; draw them in __getitem__ (without __getitems__), or in the recipe's augment"
            )
        self._checked = True
        return found


class DrawnError(InputError):
    """A dataset draws random numbers where it must not."""


Reader = ColumnReader | DatasetReader


def make_reader(
    examples: Any, collate: Collate | None, seed: int, *, double: bool, instead: Order | None = None
) -> Reader:
    """Choose how ``examples`` are read; float64 columns become float32 unless the model is ``double``.

    ``instead`` shows another example in the place of one that cannot be read; without it such a one raises.
    """
    whole, rows, n = examples, None, count(examples)
    if isinstance(examples, Part):
        whole, rows = examples.whole, examples.rows
    if isinstance(whole, Mapping):
        columns = ColumnReader(dict(whole), rows, n, double=double)
        return columns if collate is None else DatasetReader(_Rows(columns), collate, at_once=True, double=double)
    many = hasattr(whole, "__getitems__") and not (hasattr(whole, "__getitem__") and _is_random(whole))
    return DatasetReader(whole, collate, rows, n, seed, many, double, instead)


def _is_random(dataset: Any) -> bool:
    """Whether reading an example draws random numbers, which is to depend on its position alone."""
    before = random_states()
    try:
        dataset.__getitems__([0])
    except Exception:  # it will be met again
        return False
    finally:
        drawn = drew(before)
        set_random_states(before)
    return drawn


class _Rows:
    """Columns for a recipe whose ``collate`` wants examples."""

    def __init__(self, reader: ColumnReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.n

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.reader((np.array(indices), np.array(indices))).batch

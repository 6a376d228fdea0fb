"""From indices to a batch: one gather per column, many rows of a table at once, or example by example."""

import mmap
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from scaletrain.errors import InputError
from scaletrain.order import Indices, Order, seed_for
from scaletrain.randomness import drew, random_states, seed_all, set_random_states
from scaletrain.recipe import MAPPED, Batch, Columns, NamedColumns, Part, count

Request = tuple[Indices, Indices]
"""Positions in the stream, which seed what is random, and the examples to read there."""
Collate = Callable[[list[Any]], Batch]
PAGES_BYTES, KEPT_BYTES = 16 * 4096, 256 << 20
"""What the kernel maps around a row that is read, and how much of that is kept."""
CUT = 256
"""Batches that are cut at a time."""
MOST_TRIES = 100
"""Replacements tried for an example that cannot be read."""
MEND = "mend it, or in training let a few be replaced with --skip-bad"


class Bad(NamedTuple):
    """An example that could not be read, and the one that took its place."""

    example: int
    reason: str
    replaced_by: int


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
        indices = indices.to(self.device)
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


@dataclass(eq=False)
class BatchReader:
    """Read batches from a map-style dataset that takes many indices at once: ``dataset.__getitems__(indices)``.

    It returns a dict of columns, used as it is, or a list of examples. Nothing in it may be random: which examples
    are read together depends on the number of processes. What is random belongs into ``__getitem__`` or ``augment``.
    """

    dataset: Any
    collate: Collate | None = None
    rows: Order | None = None
    n: int = 0
    """Examples; by default all of the dataset."""
    seed: int = 0
    double: bool = False
    instead: Order | None = None
    """What shows another example in the place of one that cannot be read; without it such a one raises."""
    _checked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.n = self.n or len(self.dataset)

    def __call__(self, request: Request) -> Read:
        bad: list[Bad] = []
        found, indices = self._found(*request, bad)
        if self.collate is not None and isinstance(found, Mapping):
            found = [{name: column[i] for name, column in found.items()} for i in range(len(indices))]
        if isinstance(found, list):
            found = collated(self.collate, found, indices)
        return Read(found if self.double else narrow(found), tuple(bad))

    def _found(self, positions: Indices, indices: Indices, bad: list[Bad]) -> tuple[Any, Indices]:
        """Read at once; where that fails one by one, to name the one that cannot be read or to replace it."""
        try:
            return self._read(indices), indices
        except DrawnError:
            raise
        except Exception:  # met again below, by the example that raises it
            pairs = zip(positions.tolist(), indices.tolist(), strict=True)
            indices = np.array([readable(self._alone, self, position, index, bad) for position, index in pairs])
        try:
            return self._read(indices), indices
        except Exception as error:
            raise InputError(f"{_shown(indices)} cannot be read together: {_reason(error)}") from error

    def _read(self, indices: Indices) -> Any:
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

    def _alone(self, position: int, index: int) -> int:
        self._read(np.array([index]))
        return index


class DrawnError(InputError):
    """A dataset draws random numbers where it must not."""


@dataclass(eq=False)
class ExampleReader:
    """Read batches from a map-style dataset example by example.

    What is random in reading an example (torch, NumPy's and Python's global generators) depends on the seed
    and the example's position alone, so neither workers nor processes change it.
    """

    dataset: Any
    collate: Collate | None = None
    rows: Order | None = None
    n: int = 0
    """Examples; by default all of the dataset."""
    seed: int = 0
    double: bool = False
    instead: Order | None = None
    """What shows another example in the place of one that cannot be read; without it such a one raises."""

    def __post_init__(self) -> None:
        self.n = self.n or len(self.dataset)

    def __call__(self, request: Request) -> Read:
        bad: list[Bad] = []
        pairs = zip(request[0].tolist(), request[1].tolist(), strict=True)
        examples = [readable(self._read, self, position, index, bad) for position, index in pairs]
        batch = collated(self.collate, examples, request[1])
        return Read(batch if self.double else narrow(batch), tuple(bad))

    def _read(self, position: int, index: int) -> Any:
        seed_all(seed_for(self.seed, 2, position))
        return self.dataset[index if self.rows is None else int(self.rows(np.array([index]))[0])]


Reader = ColumnReader | BatchReader | ExampleReader


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
        return columns if collate is None else BatchReader(_Rows(columns), collate, double=double)
    many = hasattr(whole, "__getitems__") and not (hasattr(whole, "__getitem__") and _is_random(whole))
    reader = BatchReader if many else ExampleReader
    return reader(whole, collate, rows, n, seed=seed, double=double, instead=instead)


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


def readable(
    read: Callable[[int, int], Any], reader: BatchReader | ExampleReader, position: int, index: int, bad: list[Bad]
) -> Any:
    """Return ``read(position, index)``, or where that raises the same of another index, noted in ``bad``.

    The other one is what the order shows elsewhere in the epoch; where depends on the seed and the position alone, so
    a run that goes on takes the same. Raises InputError where nothing may be replaced, or nothing can be read.
    """
    other, reason = index, ""
    for attempt in range(1, MOST_TRIES + 1):
        try:
            found = read(position, other)
        except Exception as error:  # whatever reading raises, the example is bad
            if reader.instead is None:
                raise unreadable(
                    error, f"example {index}", "mend it, or let a few be replaced with --skip-bad"
                ) from error
            reason, n = reason or _reason(error), reader.instead.n
            place = position - position % n + seed_for(reader.seed, 4, position, attempt) % n
            other = int(reader.instead(np.array([place]))[0])
            continue
        if attempt > 1:
            bad.append(Bad(index, reason, other))
        return found
    raise InputError(f"example {index} cannot be read ({reason}), nor can {MOST_TRIES - 1} others in its place")


def collated(collate: Collate | None, examples: list[Any], indices: Indices | None = None) -> Batch:
    """Make a batch. Raises InputError where that fails, naming two examples that differ in shape if there are such."""
    try:
        return (collate or default_collate)(examples)
    except InputError:
        raise
    except Exception as error:
        which = "examples of the stream" if indices is None else _shown(indices)
        if unlike := _unlike(examples):
            which = which if indices is None else f"the examples {indices[0]} and {indices[unlike[0]]}"
            which += f" ({unlike[1]})"
        advice = "give the recipe a collate that pads or packs them" if collate is None else "mend the recipe's collate"
        raise InputError(f"{which} make no batch: {_reason(error)}; {advice}") from error


def _unlike(examples: list[Any]) -> tuple[int, str] | None:
    """Return the first example that differs from the one at the beginning, and in what."""
    first = dict(_leaves(examples[0]))
    for k, example in enumerate(examples):
        other = dict(_leaves(example))
        for name in first | other:
            if first.get(name) != other.get(name):
                return k, f"{name}{first.get(name, 'missing')} and {other.get(name, 'missing')}"
    return None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of each leaf, and its shape or type."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}{key} ")
    elif isinstance(value, tuple | list):
        for k, part in enumerate(value):
            yield from _leaves(part, f"{name}{k} ")
    else:
        yield name, f"{tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _shown(indices: Indices) -> str:
    return f"the examples {', '.join(map(str, indices[:8].tolist()))}{', ...' * (len(indices) > 8)}"


def unreadable(error: Exception, what: str, advice: str = "mend it") -> InputError:
    """Return the error for what cannot be read: which, why, where in the code, and what to do."""
    if isinstance(error, InputError):
        return error
    return InputError(f"{what} cannot be read: {_reason(error)}; {advice}")


def _reason(error: Exception) -> str:
    """Say in one line what was raised, and where."""
    if isinstance(error, InputError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno})" if frames else ""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}{where}"


def _kind(name: str, column: Tensor, double: bool) -> torch.dtype:
    if column.dtype == torch.float64 and not double:
        return torch.float32
    whole = not column.is_floating_point() and not column.is_complex() and column.dtype != torch.bool
    return torch.int64 if name == "label" and whole else column.dtype


def narrow(batch: Batch) -> Batch:
    """Turn float64 into float32, which is what models compute in, and name the columns of a dict."""
    if isinstance(batch, Tensor):
        return batch.float() if batch.dtype == torch.float64 else batch
    if isinstance(batch, Mapping):
        return NamedColumns({name: narrow(leaf) for name, leaf in batch.items()})
    if isinstance(batch, tuple | list):
        leaves = [narrow(leaf) for leaf in batch]
        return type(batch)(*leaves) if hasattr(batch, "_fields") else type(batch)(leaves)
    return batch

"""What a recipe learns from: columns or map-style data sets, a part of one, or a stream."""

import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletrain.batches import NamedColumns
from scaletrain.errors import InputError
from scaletrain.order import Order

Columns = dict[str, Tensor]
IGNORED_LABEL = -100
"""The label that torch's cross entropy ignores by default."""
MAPPED = "scaletrain_memory_map"
"""Attribute of a column that lies in a memory map of a file."""
MANY_COLUMNS = {
    "DataFrame": "give datasets.Dataset.from_pandas(frame), or load(...) a file of it",
    "DatasetDict": "give one of its splits to each of train, val and test, or all of it to load",
}
"""Objects that look like columns and are none."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of columns or of a map-style dataset, in an order of their own; nothing is copied.

    ``rows`` maps 0..n-1 to the rows of ``whole``.
    """

    whole: Any
    rows: Order
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.n:
            raise IndexError(index)
        row = int(self.rows(np.array([index]))[0])
        if isinstance(self.whole, Mapping):
            return {name: column[row] for name, column in self.whole.items()}
        return self.whole[row]


@dataclass
class Data:
    """Training examples and, where there are any, held-out ones.

    Each split is a dict of columns (tensors or NumPy arrays with one row an example, taken without a copy) or
    a map-style dataset. Raises InputError for an empty split, columns of different lengths, and integer
    labels outside ``classes``.
    """

    train: Any
    val: Any = None
    test: Any = None
    classes: Sequence[str] | None = None
    """Names of the classes that the integers of the column ``label`` stand for."""
    order: Order | None = None
    """Which example each position reads; default: shuffled anew in each epoch by the config's seed."""
    shuffle_buffer: int = 1000
    """Examples of a stream (an IterableDataset) that are shuffled together; 1 keeps its order."""
    divided: bool = False
    """The stream divides itself by rank: each process reads all that it gets, and nothing is compared."""

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            examples = getattr(self, split)
            if type(examples).__name__ in MANY_COLUMNS:
                raise InputError(f"{split} is a {type(examples).__name__}; {MANY_COLUMNS[type(examples).__name__]}")
            if isinstance(examples, Mapping):
                setattr(self, split, _columns(examples, split, self.classes))
            elif examples is not None and (
                isinstance(examples, tuple | str)
                or (
                    not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__"))
                    and not (split == "train" and is_stream(examples))
                )
            ):
                raise InputError(
                    f"{split} is a {type(examples).__name__}; give a dict of columns or a map-style dataset"
                    + (", or for training an IterableDataset" if split == "train" else "")
                )
            elif examples is not None and hasattr(examples, "__len__") and len(examples) == 0:
                raise InputError(f"{split} is empty; it needs at least one example")
        if self.shuffle_buffer < 1:
            raise InputError(f"shuffle_buffer is {self.shuffle_buffer}; it is a number of examples, at least 1")
        if hasattr(self.train, "__next__"):
            raise InputError("train is an iterator, which can be read once; give an IterableDataset")
        if self.train is None:
            raise InputError("train is None; a recipe learns from something")
        if self.divided and not is_stream(self.train):
            raise InputError(f"divided is for a stream, but train is a {type(self.train).__name__}; leave divided out")

    @property
    def n_classes(self) -> int:
        """Number of classes: the names, or the largest ``label`` and 1. Raises InputError where there are no labels."""
        if self.classes is not None:
            return len(self.classes)
        columns = self.train.whole if isinstance(self.train, Part) else self.train
        label = columns.get("label") if isinstance(columns, Mapping) else None
        if label is None and isinstance(columns, Mapping) and "target" in columns:
            raise InputError(
                "the data has numbers to predict ('target'), not class labels; recipes/regression.py learns those, or "
                "choose the column with load(..., columns={'label': ...}) in the recipe's data"
            )
        if label is None or label.is_floating_point():
            raise InputError(
                "the data has no class labels; call their column label, labels, class, target or y, or choose it with "
                "load(..., columns={'label': ...}) in the recipe's data"
            )
        return int(label.max()) + 1

    def sample(self, most: int = 10_000) -> Columns:
        """Return up to ``most`` training examples as columns, evenly spaced: to scale by, or to see what there is."""
        n = count(self.train)
        places = np.linspace(0, n - 1, min(n, most)).astype(np.int64)
        whole = self.train.whole if isinstance(self.train, Part) else self.train
        rows = self.train.rows(places) if isinstance(self.train, Part) else places
        if isinstance(whole, Mapping):
            return NamedColumns((name, column[torch.from_numpy(rows)]) for name, column in whole.items())
        from torch.utils.data import default_collate

        many = hasattr(whole, "__getitems__")
        found: Any = whole.__getitems__(rows.tolist()) if many else [whole[int(i)] for i in rows]
        return NamedColumns(default_collate(found) if isinstance(found, list) else found)


def count(examples: Any) -> int:
    """Return how many examples columns or a map-style dataset have."""
    return len(next(iter(examples.values()))) if isinstance(examples, Mapping) else len(examples)


def is_stream(examples: Any) -> bool:
    """Whether ``examples`` can be iterated, but neither counted nor indexed."""
    return hasattr(examples, "__iter__") and not hasattr(examples, "__len__")


def _columns(examples: Mapping[str, Any], split: str, classes: Sequence[str] | None) -> Columns:
    columns = {name: _as_tensor(column, f"{split} column '{name}'") for name, column in examples.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if not lengths or min(lengths.values()) == 0:
        raise InputError(f"{split} is empty; it needs at least one example")
    if len(set(lengths.values())) > 1:
        raise InputError(f"the columns of {split} have different lengths: {lengths}")
    label = columns.get("label")
    if classes is not None and label is not None and not label.is_floating_point():
        parts = (label[start : start + (1 << 20)] for start in range(0, len(label), 1 << 20))  # it may be a memory map
        meant = (part[part != IGNORED_LABEL] for part in parts)
        ends = [int(end) for part in meant if len(part) for end in (part.min(), part.max())]
        low, high = min(ends, default=0), max(ends, default=0)
        if low < 0 or high >= len(classes):
            raise InputError(
                f"{split} has labels from {low} to {high}, but there are {len(classes)} classes: "
                f"labels must lie in 0..{len(classes) - 1}"
            )
    return columns


def memory_map(array: Any) -> mmap.mmap | None:
    """Return the memory map of a file that ``array`` reads from, if it does and nothing was written to a copy of it."""
    while array is not None:
        if isinstance(array, np.memmap) and array.mode == "c":
            return None
        if isinstance(array, mmap.mmap):
            return array
        array = getattr(array, "base", None)
    return None


def _as_tensor(column: Any, what: str) -> Tensor:
    mapped = getattr(column, MAPPED, None)
    if isinstance(column, Tensor):
        tensor = column.detach().cpu()
    else:
        try:
            mapped, array = memory_map(column), np.asarray(column)
        except ValueError:  # lists in lists
            sizes = [np.size(row) if not isinstance(row, list | tuple) else len(row) for row in column]
            other = next((row for row, size in enumerate(sizes) if size != sizes[0]), 0)
            raise InputError(f"{what} has rows of different lengths, the first is row {other}; pad them") from None
        if array.dtype.kind not in "biuf":
            raise InputError(f"{what} holds {array.dtype}; a column is numbers, one row an example")
        wider = {"u2": np.int32, "u4": np.int64, "u8": np.int64, "f16": np.float64}.get(array.dtype.str[1:])
        array = np.asarray(array, dtype=wider or array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in array.strides):
            array = np.ascontiguousarray(array)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
            tensor = torch.from_numpy(array)
    if tensor.ndim == 0:
        raise InputError(f"{what} is a single number; a column has one row an example")
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # what lies around a row would be read for nothing
        setattr(tensor, MAPPED, mapped)
    return tensor

"""What an experiment is: a recipe, a value made of plain functions, and the data it learns from."""

import hashlib
import mmap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from scaletrain.config import Config
from scaletrain.content import content_hash
from scaletrain.errors import InputError
from scaletrain.optimizers import adamw
from scaletrain.order import Order, digest_of
from scaletrain.randomness import random_states, seed_all, set_random_states
from scaletrain.schedules import Schedule, constant

Columns = dict[str, Tensor]
Batch = Any
"""A dict, tuple or tensor of tensors whose first dimension is the examples."""
IGNORED_LABEL = -100
"""The label that torch's cross entropy ignores by default."""
MAPPED = "scaletrain_memory_map"
"""Attribute of a column that lies in a memory map of a file."""
MANY_COLUMNS = {
    "DataFrame": "give datasets.Dataset.from_pandas(frame), or load(...) a file of it",
    "DatasetDict": "give one of its splits to each of train, val and test, or all of it to load",
}
"""Objects that look like columns and are none."""
READ = 4
"""Examples of a map-style dataset by which it is told from another."""
Metric = Tensor | tuple[Tensor, Tensor]
Hook = Callable[[Any, Any], None]


class NamedColumns(dict[str, Any]):
    """Columns by name that say what there is when asked for what there is not."""

    def __missing__(self, name: str) -> Any:
        raise InputError(f"there is no column '{name}'; the columns are {', '.join(map(repr, self))}")


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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment: data, model, loss and schedule. Make variants with ``dataclasses.replace``.

    ``model``, ``loss``, ``evaluate`` and the rest are plain functions; the config is the last argument of
    all but ``schedule``'s steps. Shapes: B is the number of examples in a micro-batch.
    """

    config: type[Config]
    """A frozen keyword-only dataclass that inherits Config."""
    data: Callable[[Any], Data]
    """``data(cfg)``; called on rank 0 first, then on the others."""
    model: Callable[[Any, Data], nn.Module]
    """``model(cfg, data)``, on the CPU, under ``seed``: the same weights on every process."""
    loss: Callable[[nn.Module, Batch, Any], Tensor]
    """``loss(model, batch, cfg)``: a scalar, the mean over ``weight(batch)``. The model may be wrapped for
    several processes: call it, do not reach for its attributes."""
    evaluate: Callable[[nn.Module, Batch, Any], dict[str, Metric]] | None = None
    """``evaluate(model, batch, cfg)``: named figures, each per example (B,), or a 0-d mean over
    ``weight(batch)``, or (sum, count); ``outputs`` goes to ``metrics``. Without it ``val_loss`` comes from
    ``loss``."""
    predict: Callable[[nn.Module, Batch, Any], dict[str, Tensor]] | None = None
    """``predict(model, batch, cfg)``: columns (B, ...) for ``scaletrain predict``, which never asks for labels.
    Default: what ``evaluate`` returns for each example."""
    metrics: Callable[[Any, Data], Mapping[str, Any]] | None = None
    """``metrics(cfg, data)``: torchmetrics objects by name, for figures that are not means (AUROC, F1, a confusion
    matrix), fed with what ``evaluate`` returns as ``outputs``: the arguments of their ``update``."""
    optimizer: Callable[[nn.Module, Any], optim.Optimizer] = adamw
    """``optimizer(model, cfg)``."""
    schedule: Schedule = constant
    """``schedule(step, total_steps, cfg)``: factors on the optimizer's own values."""
    weight: Callable[[Batch], Tensor] | None = None
    """``weight(batch)``, 0-d: what ``loss`` is the mean over, as valid tokens. Default: the number of examples.
    Where it may be 0, ``loss`` must not divide by it: ``clamp(min=1)``."""
    augment: Callable[[Batch, Any], Batch] | None = None
    """``augment(batch, cfg)``: on the device, in training only, with torch's default generators."""
    collate: Callable[[list[Any]], Batch] | None = None
    """``collate(examples)``: only for a dataset that is read example by example."""
    hooks: Callable[[Any], Sequence[Hook]] | None = None
    """``hooks(cfg)``: fresh callables ``hook(run, info)``, called after each step on every process."""
    expect: Mapping[str, str] | None = None
    """What the exported weights must reach at default settings, as in ``{"val_accuracy": ">=0.97"}``."""


def fingerprint(data: Data) -> str:
    """Hash what tells one data set from another: sizes, column types, and a sample of 64 rows of each column.

    Of a map-style dataset, its length and what its method ``fingerprint()`` returns, or else a few of its examples.
    """
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        digest.update(split.encode())
        _digest(getattr(data, split), digest)
    digest.update(b" divided" if data.divided else b"")
    return digest.hexdigest()


def _digest(examples: Any, digest: "hashlib._Hash") -> None:
    if isinstance(examples, Part):
        digest.update(f" {examples.n} {digest_of(examples.rows)}".encode())
        _digest(examples.whole, digest)
    elif isinstance(examples, Mapping):
        for name, column in examples.items():
            digest.update(f" {name} {tuple(column.shape)} {column.dtype}".encode())
            rows = torch.from_numpy(np.linspace(0, len(column) - 1, 64).astype(np.int64))
            digest.update(content_hash(column[rows]).encode())
    elif examples is not None:
        known = getattr(examples, "fingerprint", None)
        known = known() if callable(known) else getattr(examples, "_fingerprint", "")  # the latter of datasets
        length = None if is_stream(examples) else len(examples)
        digest.update(f" {length} {known or _few(examples)}".encode())


def _few(examples: Any) -> str:
    """Hash a few examples; one that cannot be read or hashed, or is another each time, is left out."""
    if is_stream(examples):
        return ""
    before = random_states()
    found = [_content(examples, int(place)) for place in np.linspace(0, len(examples) - 1, READ)]
    set_random_states(before)
    return " ".join(found)


def _content(examples: Any, index: int) -> str:
    found = set()
    try:
        for _ in range(2):
            seed_all(0)
            found.add(content_hash(examples[index]))
    except Exception:  # reading it will say so when it is needed
        return ""
    return found.pop() if len(found) == 1 else ""


def unmet(expect: Mapping[str, str] | None, metrics: Mapping[str, float]) -> list[str]:
    """Return a sentence for each expectation that ``metrics`` misses."""
    compare = {">=": lambda got, want: got >= want, "<=": lambda got, want: got <= want}
    misses = []
    for name, wanted in (expect or {}).items():
        got = metrics.get(name, float("nan"))
        if not compare[wanted[:2]](got, float(wanted[2:])):
            misses.append(f"{name} is {got:.4g}, expected {wanted}")
    return misses


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

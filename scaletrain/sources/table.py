"""Rows of an Arrow table, many at a time, as tensors."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaletrain.errors import InputError
from scaletrain.sources import pictures


class Column(NamedTuple):
    """A column of a batch: its name, where it comes from, and what it holds."""

    name: str
    sources: tuple[str, ...]
    kind: Literal["numbers", "integers", "stacked", "label", "image", "text"]


class Table:
    """A datasets.Dataset as a map-style dataset of tensors that reads many rows at once.

    Tables that do not fit into memory stay on the disk, mapped; images are decoded as they are read.
    """

    def __init__(
        self, dataset: Any, columns: Sequence[Column], classes: Sequence[Any] | None, image_size: int | None, where: str
    ) -> None:
        """``classes`` are the values of the label column, sorted; None where it counts classes already."""
        self.columns, self.classes, self.image_size, self.where = columns, classes, image_size, where
        self.arrow = dataset.with_format("arrow")
        self.unreadable: InputError | None = None
        """What is wrong with an image of it, where that is known already."""

    def __len__(self) -> int:
        return len(self.arrow)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int] | NDArray[np.integer]) -> dict[str, Any]:
        """Return the columns of these rows: tensors, and lists of text. Raises InputError naming a bad row."""
        rows = np.asarray(indices)
        table = self.arrow[rows]
        return {column.name: self._read(column, table, rows) for column in self.columns}

    def label(self, name: str) -> NDArray[np.int64]:
        """Return the whole label column ``name`` as classes 0..C-1."""
        (column,) = [column for column in self.columns if column.name == name]
        table = self.arrow.select_columns(list(column.sources))[:]
        labels: NDArray[np.int64] = self._read(column, table, np.arange(len(self))).numpy()
        return labels

    def unlabelled(self, source: str) -> bool:
        """Whether no row has a label: all are -1 or missing."""
        import pyarrow.compute as pc

        column = self.arrow.select_columns([source])[:][source]
        return bool(column.null_count == len(column) or pc.all(pc.equal(column.cast("string"), "-1")).as_py())

    def fingerprint(self) -> str:
        """Hash 64 rows as they are stored."""
        rows = np.linspace(0, len(self) - 1, 64).astype(np.int64)
        sources = [source for column in self.columns for source in column.sources]
        table = self.arrow.select_columns(sources)[rows]
        digest = hashlib.sha256(f"{len(self)} {self.columns}".encode())
        for column in self.columns:
            for source in column.sources:
                values = table[source].to_pylist()
                if column.kind == "image":  # the same pictures may lie in another folder
                    values = [(Path(value["path"] or "").name, value["bytes"]) for value in values]
                digest.update(repr(values).encode())
        return digest.hexdigest()

    def _read(self, column: Column, table: Any, rows: NDArray[np.int64]) -> Any:
        found = [table[source] for source in column.sources]
        if column.kind == "text":
            return self._text(found[0], column.sources[0], rows)
        if column.kind == "image":
            return self._images(found[0].to_pylist(), rows)
        if column.kind == "label":
            return torch.from_numpy(self._classes(found[0], column, rows))
        arrays = [self._numbers(one, source, rows) for one, source in zip(found, column.sources, strict=True)]
        if column.kind == "stacked":
            return torch.from_numpy(np.stack([array.astype(np.float32) for array in arrays], axis=1))
        if column.kind == "integers":
            return torch.from_numpy(arrays[0].astype(np.int64))
        return torch.from_numpy(arrays[0].astype(np.float32) if column.name == "target" else arrays[0])

    def _text(self, column: Any, source: str, rows: NDArray[np.int64]) -> list[str]:
        if column.null_count:
            raise self._bad(source, rows, np.asarray(column.is_null()), "has no text")
        texts: list[str] = column.to_pylist()
        return texts

    def _numbers(self, column: Any, source: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        array = to_numpy(column, lambda bad, what: self._bad(source, rows, bad, what))
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                finite = np.isfinite(array.astype(np.float32, copy=False))  # what models compute in
            bad = np.asarray(~finite.reshape(len(array), -1).all(axis=1))
            if bad.any():
                too_large = np.isfinite(array[int(np.argmax(bad))]).all()
                raise self._bad(source, rows, bad, "is too large for float32" if too_large else "is NaN or infinite")
        return array if array.flags.writeable else array.copy()

    def _images(self, found: list[Any], rows: NDArray[np.int64]) -> Tensor:
        images = [pictures.read(one, self.image_size, self.where, row) for one, row in zip(found, rows, strict=True)]
        for image, row in zip(images, rows, strict=True):
            if image.shape != images[0].shape:
                first, other = (f"{one.shape[2]} x {one.shape[1]}" for one in (images[0], image))
                raise InputError(
                    f"{self.where}: the images have different sizes, {first} in row {rows[0]} "
                    f"and {other} in row {row}; give image_size"
                )
        return torch.stack(images)

    def _classes(self, column: Any, target: Column, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        source = target.sources[0]
        if column.null_count:
            raise self._bad(source, rows, np.asarray(column.is_null()), "has no label")
        if self.classes is not None:
            import pyarrow as pa
            import pyarrow.compute as pc

            known = pa.array(self.classes, type=column.type)
            places = pc.index_in(column, value_set=known).fill_null(-1).to_numpy()
            if len(places) and places.min() < 0:
                value = column[int(np.argmin(places))].as_py()
                raise self._bad(source, rows, places < 0, f"is {value!r}, which no training example has")
            return np.array(places, dtype=np.int64)
        places = np.array(column.to_numpy(), dtype=np.int64)
        if len(places) and places.min() < 0:
            raise self._bad(source, rows, places < 0, "has no label")
        return places

    def _bad(self, source: str, rows: NDArray[np.int64], bad: NDArray[np.bool_], what: str) -> InputError:
        row = int(rows[int(np.argmax(bad))])
        return InputError(f"{self.where}: column '{source}' {what} in row {row} (counted from 0)")


def kind_of(feature: Any) -> str:
    """Say what a feature of datasets holds: number, numbers, text, classes, image or other."""
    kind = type(feature).__name__
    if kind in ("ClassLabel", "Image"):
        return {"ClassLabel": "classes", "Image": "image"}[kind]
    if kind == "Value":
        dtype = feature.dtype
        numeric = dtype.startswith(("int", "uint", "float", "bool"))
        return "number" if numeric else "text" if "string" in dtype else "other"
    if kind in ("List", "LargeList", "Sequence"):
        return "numbers" if kind_of(feature.feature) in ("number", "numbers") else "other"
    return "numbers" if kind.startswith("Array") else "other"


def as_table(examples: Any, where: str) -> Any:
    """Return a datasets.Dataset of numbers and text as a Table, which reads it 100 times as fast; else it as it is.

    Whole numbers in a column ``label`` become int64. One that has a transform of its own is left alone.
    """
    if not type(examples).__module__.startswith("datasets.") or not hasattr(examples, "__len__"):
        return examples
    kinds = {name: kind_of(feature) for name, feature in examples.features.items()}
    shown = examples.format["columns"]
    plain = all(kinds[name] in ("number", "numbers", "classes", "text") for name in shown)
    if not plain or examples.format["type"] not in (None, "torch", "numpy", "arrow"):
        return examples
    columns = [Column(name, (name,), "text" if kinds[name] == "text" else "numbers") for name in shown]
    if "label" in shown and _is_whole(examples, "label"):
        columns = [column._replace(kind="integers") if column.name == "label" else column for column in columns]
    return Table(examples, columns, None, None, where)


def _is_whole(examples: Any, name: str) -> bool:
    """Whether all of a column are whole numbers: a float column has to be read to know it."""
    import pyarrow.compute as pc

    dtype = getattr(examples.features[name], "dtype", "")
    if not dtype.startswith("float"):
        return bool(dtype.startswith(("int", "uint")))
    column = examples.with_format("arrow").select_columns([name])[:][name]
    return bool(pc.all(pc.equal(column, pc.trunc(column))).as_py())


def check_readable(examples: Any) -> None:
    """Raise InputError for an image that loading found to be broken: a run that may replace none need not begin."""
    found = getattr(getattr(examples, "whole", examples), "unreadable", None)
    if found is not None:
        raise InputError(str(found))


def _bad_row(bad: NDArray[np.bool_], what: str) -> InputError:
    return InputError(f"a column {what} in row {int(np.argmax(bad))} (counted from 0)")


def to_numpy(column: Any, bad: Callable[[NDArray[np.bool_], str], InputError] = _bad_row) -> NDArray[Any]:
    """Return an Arrow column of numbers, or of lists of equal length, as one array.

    Raises what ``bad`` makes of the rows (N,) that miss a value or have another length, and a word on it.
    """
    import pyarrow as pa

    def check(wrong: Any, what: str) -> None:
        mask = np.asarray(wrong)
        if mask.any():
            raise bad(np.asarray(mask.reshape(len(column), -1).any(axis=1)), what)

    shape = [len(column)]
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while isinstance(array, pa.ExtensionArray):
        array = array.storage
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        check(array.is_null(), "is missing" if len(shape) == 1 else "misses a list")
        inner = array.flatten()
        if not pa.types.is_fixed_size_list(array.type):
            sizes = np.diff(np.asarray(array.offsets))
            other = sizes != sizes[:1]
            if other.any():
                lengths = f"{sizes[other][0]} where others have {sizes[0]},"
                check(other, f"has rows of different lengths (pad them), {lengths}")
        shape.append(len(inner) // len(array) if len(array) else 0)
        array = inner
    check(array.is_null(), "is missing" if len(shape) == 1 else "misses a number")
    numbers: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return numbers.reshape(shape)

"""Which columns of a table are inputs and labels, and the way from tables to training data."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaletrain.data import Data, Part
from scaletrain.errors import InputError
from scaletrain.sources.arrays import no_such_column, without_missing_labels
from scaletrain.sources.pictures import BadImageError
from scaletrain.sources.split import COPIED_BYTES, RANKED, with_held_out
from scaletrain.sources.table import Column, Table, kind_of

LABELS = ("label", "labels", "class", "target", "y")
"""Names by which a column of labels is known, where its type does not tell."""
TARGETS = ("target", "y")
"""Those of them that may be a number to predict."""
MOST_CLASSES = 10_000


def to_splits(
    tables: Mapping[str, Any],
    where: str,
    columns: Mapping[str, str | Sequence[str]] | None,
    image_size: int | None,
    split_seed: int | None,
    val_share: float,
) -> Data:
    """Return the splits of a source as training data: tensors where they are small, else read from the disk.

    ``tables`` maps train, val and test to a datasets.Dataset each; where there is no val, it is held out.
    Raises InputError for a column that is not there or holds what cannot be learned from.
    """
    features = tables["train"].features
    if columns is not None and split_seed is None:
        filled = [name for name, feature in features.items() if getattr(feature, "dtype", "") != "null"]
        columns = without_missing_labels(columns, filled)
    wanted = find(tables["train"], where) if columns is None else named(features, columns, where)
    label = next((column.sources[0] for column in wanted if column.kind == "label"), None)
    least = 2 if split_seed is not None else 1
    values, names = (None, None) if label is None else classes(tables["train"], label, where, least)
    splits = {}
    if "test" in tables and label not in (None, *tables["test"].features):
        tables = {split: table for split, table in tables.items() if split != "test"}  # as competitions have them
    for split in ("train", "val", "test"):
        if split in tables:
            _check_alike(tables[split].features, features, wanted, f"{where}: {split}")
            splits[split] = Table(
                tables[split], wanted, values, image_size, where if split == "train" else f"{where}: {split}"
            )
    if label is not None and "test" in splits and splits["test"].unlabelled(label):
        del splits["test"]  # as the Hub has them: its answers are secret
    ranked = label is not None and "val" not in splits and split_seed is not None and len(splits["train"]) <= RANKED
    labels = splits["train"].label(next(c.name for c in wanted if c.kind == "label")) if ranked else None
    data = with_held_out(
        Data(splits["train"], splits.get("val"), splits.get("test"), names), split_seed, val_share, labels
    )
    for split in ("train", "val", "test"):
        setattr(data, split, in_memory(getattr(data, split), bad_images=split == "train"))
    return Data(data.train, data.val, data.test, names)  # checked once more, as tensors


def _check_alike(features: Mapping[str, Any], others: Mapping[str, Any], wanted: list[Column], where: str) -> None:
    """Raise InputError for a column of a split that is not there, or is of another kind than in training."""
    for source in (source for column in wanted for source in column.sources):
        if source not in features:
            raise no_such_column(where, source, features)
        if kind_of(features[source]) != kind_of(others[source]):
            raise InputError(
                f"{where}: column '{source}' holds {_type(features[source])}, in training {_type(others[source])}"
            )


def in_memory(examples: Table | Part | None, *, bad_images: bool) -> Any:
    """Return the columns as tensors where they are numbers and small; else ``examples`` as they are.

    So they stay too where ``bad_images`` may be replaced as they are read, and there is one.
    """
    if examples is None:
        return None
    whole = examples.whole if isinstance(examples, Part) else examples
    if any(column.kind == "text" for column in whole.columns):
        return examples
    rows = np.arange(len(examples))
    if isinstance(examples, Part):
        rows = examples.rows(rows)
    try:
        row_bytes = sum(column.nbytes for column in whole.__getitems__(rows[:1]).values())
        return examples if row_bytes * len(examples) > COPIED_BYTES else whole.__getitems__(rows)
    except BadImageError as error:
        if not bad_images:
            raise
        whole.unreadable = error
        return examples


def find(table: Any, where: str) -> list[Column]:
    """Choose columns by type and name: image, label, text, lists of numbers, and single numbers as ``features``.

    A column called target or y with many different numbers is a number to predict, ``target``: more than 50 and
    than a tenth of the rows. Warns of columns of other types, which are left out.
    """
    features = table.features
    kinds = {name: kind_of(feature) for name, feature in features.items()}
    label = next((name for name, kind in kinds.items() if kind == "classes"), None)
    named = [name for name in LABELS if kinds.get(name) in ("number", "text")]
    target = next((name for name in named if name in TARGETS and _many_values(table, name, kinds[name])), None)
    label = label or next((name for name in named if name != target), None)
    if label is not None:
        target = None
    found, singles = [], []
    if "number" in kinds.values():
        _check_typing_errors(table, [name for name, kind in kinds.items() if kind == "text" and name != label], where)
    for name, kind in kinds.items():
        if name == label:
            found.append(Column("label", (name,), "label"))
        elif name == target:
            found.append(Column("target", (name,), "numbers"))
        elif kind == "number":
            singles.append(name)
        elif kind in ("numbers", "text"):
            found.append(Column(name, (name,), "numbers" if kind == "numbers" else "text"))
        elif kind == "image":
            found.append(Column("image" if "image" not in (c.name for c in found) else name, (name,), "image"))
    if singles:
        found.append(Column("features", tuple(sorted(singles)), "stacked"))  # in whatever order a file has them
    if all(column.name in ("label", "target") for column in found):
        raise InputError(
            f"{where} has no column to learn from; it has {', '.join(f'{n!r} ({f})' for n, f in features.items())}"
        )
    left_out = [f"'{name}' ({_type(features[name])})" for name, kind in kinds.items() if kind == "other"]
    if left_out:
        warnings.warn(
            f"{where}: left out {', '.join(left_out)}, neither numbers nor text nor images; name the columns you want "
            "with columns={...}",
            stacklevel=2,
        )
    return sorted(found)


def _check_typing_errors(table: Any, names: list[str], where: str) -> None:
    """Raise InputError for a column of text most of which are numbers: one slip would make all of it no input."""
    import pyarrow.compute as pc

    for name in names:
        column = table.with_format("arrow").select_columns([name])[:][name]
        is_number = pc.match_substring_regex(column, r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")
        slips = pc.indices_nonzero(pc.invert(pc.fill_null(is_number, True))).to_pylist()
        if len(column) and len(slips) < len(column) / 2:
            value = column[slips[0]].as_py() if slips else "text"
            raise InputError(
                f"{where}: column '{name}' is taken for text because of {value!r} in row {slips[0] if slips else 0} "
                "(counted from 0), and most of it are numbers; mend it, or name the columns you want with columns={...}"
            )


def _many_values(table: Any, name: str, kind: str) -> bool:
    """Whether a column of numbers has more than 50 different ones, and than a tenth of the rows."""
    import pyarrow.compute as pc

    if kind != "number":
        return False
    column = table.with_format("arrow").select_columns([name])[:][name]
    return bool(pc.count_distinct(column).as_py() > max(50, len(column) / 10))


def _type(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def named(features: Mapping[str, Any], columns: Mapping[str, str | Sequence[str]], where: str) -> list[Column]:
    """Return the columns that the caller names; several sources are stacked side by side."""
    found = []
    for name, source in columns.items():
        sources = (source,) if isinstance(source, str) else tuple(source)
        for one in sources:
            if one not in features:
                near = difflib.get_close_matches(one, features, n=1)
                error = no_such_column(where, one, features)
                raise InputError(f"{error}; did you mean '{near[0]}'?") if near else error
            kind = kind_of(features[one])
            if kind == "other" or (not isinstance(source, str) and kind != "number"):
                raise InputError(f"{where}: column '{one}' holds {features[one]}; {name} needs numbers")
        if name == "label" and kind in ("number", "classes", "text"):
            found.append(Column(name, sources, "label"))
        elif not isinstance(source, str):
            found.append(Column(name, sources, "stacked"))
        else:
            found.append(Column(name, sources, kind if kind in ("image", "text") else "numbers"))  # type: ignore[arg-type]
    return found


def classes(table: Any, label: str, where: str, least: int = 2) -> tuple[list[Any] | None, list[str]]:
    """Return the values of the label column in order, None where it counts classes already, and the classes' names.

    Raises InputError for fewer than ``least``.
    """
    import pyarrow.compute as pc

    feature = table.features[label]
    if type(feature).__name__ == "ClassLabel":
        names = list(feature.names)
        if len(names) < least:
            raise InputError(
                f"{where} has one class, {names[0] if names else 'none'!r}; there is nothing to tell apart"
            )
        return None, names
    column = table.with_format("arrow").select_columns([label])[:][label]
    values = [value for value in pc.unique(column).drop_null().to_pylist() if value == value]  # NaN is no class
    fractions = (
        [value for value in values if isinstance(value, float) and value != int(value)]
        if all(isinstance(value, float) and np.isfinite(value) for value in values)
        else []
    )
    if fractions:
        row = pc.index(column, fractions[0]).as_py()
        raise InputError(
            f"{where}: column '{label}' is {fractions[0]} in row {row} (counted from 0), but labels are whole numbers "
            f"or names; for a number to predict, name it otherwise: columns={{'target': '{label}', ...}}"
        )
    if not least <= len(values) <= MOST_CLASSES:
        raise InputError(
            f"{where}: column '{label}' has {len(values)} different values; "
            f"{least} to {MOST_CLASSES} classes are expected"
        )
    values = sorted(values)
    return values, [str(int(value)) if isinstance(value, float) else str(value) for value in values]

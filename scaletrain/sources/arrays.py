"""NumPy files and columns in memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from scaletrain.data import Data
from scaletrain.errors import InputError


def read(path: Path) -> dict[str, Any]:
    """Map a .npy file into memory as the column ``features``, or read the arrays of a .npz by name; never pickles.

    Raises InputError naming the file and the array.
    """
    try:
        if path.suffix.lower() == ".npy":
            found = {"features": open_npy(path)}
        else:
            with path.open("rb") as raw, np.lib.npyio.NpzFile(raw, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise unreadable(path, error) from None
    for name, array in found.items():
        if array.dtype.kind == "f" and path.suffix.lower() == ".npz" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise InputError(f"{path}: array '{name}' row {row} holds NaN or infinity; fill it in or leave the row out")
    return found


def open_npy(path: Path) -> np.ndarray:
    """Map a .npy file into memory: what is not read is not loaded."""
    try:
        return np.lib.format.open_memmap(path, mode="r").view(np.ndarray)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, error) from None


def chosen(found: Mapping[str, Any], columns: Mapping[str, str | Sequence[str]] | None, where: str) -> dict[str, Any]:
    """Return the columns that ``columns`` names, several stacked side by side; all of them where it is None."""
    if columns is None:
        return dict(found)
    result = {}
    for name, source in columns.items():
        names = [source] if isinstance(source, str) else list(source)
        for one in names:
            if one not in found:
                raise no_such_column(where, one, found)
            first, shape = np.shape(found[names[0]]), np.shape(found[one])
            if shape != first:
                raise InputError(
                    f"{where}: '{names[0]}' is of shape {first} and '{one}' of {shape}; side by side they must be alike"
                )
        result[name] = found[names[0]] if isinstance(source, str) else np.stack([found[one] for one in names], axis=1)
    return result


def check(columns: Mapping[str, str | Sequence[str]] | None) -> None:
    """Raise InputError for a choice of columns that names none, or several for the label."""
    if columns is None:
        return
    if not columns or not all(columns.values()):
        raise InputError(f"columns={dict(columns)} names no column; leave it out, or name some")
    if not isinstance(columns.get("label", ""), str):
        raise InputError(f"columns names {list(columns['label'])} for label; it is one column, as 'species'")


def without_missing_labels(
    columns: Mapping[str, str | Sequence[str]], found: Iterable[str]
) -> Mapping[str, str | Sequence[str]]:
    """Return ``columns`` without the label and the target that are not there: new data need not have them."""
    known = set(found)
    return {
        name: source
        for name, source in columns.items()
        if name not in ("label", "target") or known.issuperset([source] if isinstance(source, str) else source)
    }


def with_whole_labels(data: Data, where: str) -> Data:
    """Turn labels of floating point into int64. Raises InputError for one that is no whole number."""
    label = data.train.get("label")
    if label is None or label.ndim > 1 or not label.is_floating_point():
        return data
    broken = ~(label.isfinite() & (label == label.trunc()))
    if broken.any():
        row = int(broken.int().argmax())
        raise InputError(
            f"{where}: column 'label' is {float(label[row]):g} in row {row} (counted from 0), but labels are whole "
            "numbers; name a number to predict otherwise, as target"
        )
    return replace(data, train=data.train | {"label": label.long()})


def no_such_column(where: str, name: str, found: Mapping[str, Any] | Sequence[str]) -> InputError:
    """Return the error for a column that is not there."""
    return InputError(f"{where} has no column '{name}'; it has {', '.join(map(repr, found))}")


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error for a file that cannot be read, with the reason in one line."""
    reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"cannot read {path}: {reason}")

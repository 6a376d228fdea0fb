"""NumPy files and columns in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from scaletrain.errors import InputError


def read(path: Path, columns: Mapping[str, str | Sequence[str]] | None) -> dict[str, Any]:
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
            raise InputError(
                f"{path}: array '{name}' row {row} holds {'NaN or infinity'}; fill it in or leave the row out"
            )
    return chosen(found, columns, str(path))


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
        result[name] = found[names[0]] if isinstance(source, str) else np.stack([found[one] for one in names], axis=1)
    return result


def no_such_column(where: str, name: str, found: Mapping[str, Any] | Sequence[str]) -> InputError:
    """Return the error for a column that is not there."""
    return InputError(f"{where} has no column '{name}'; it has {', '.join(map(repr, found))}")


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error for a file that cannot be read, with the reason in one line."""
    reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"cannot read {path}: {reason}")

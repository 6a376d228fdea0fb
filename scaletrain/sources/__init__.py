"""From a name to training data: built-in sets, files and folders, the Hub, arrays in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaletrain.data import Data
from scaletrain.errors import InputError
from scaletrain.sources import arrays, builtin, files, tokens
from scaletrain.sources.columns import to_splits
from scaletrain.sources.split import with_held_out

ARRAYS = (".npy", ".npz")


def load(
    source: Any,
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    image_size: int | None = None,
    length: int | None = None,
    split_seed: int | None = 0,
    val_share: float = 0.2,
) -> Data:
    """Load training data and hold out ``val_share`` of it where the source has no validation split of its own.

    ``source`` is a built-in name (digits, iris, wine, breast_cancer, diabetes, stdlib), a file (CSV, TSV, JSON lines,
    Parquet, Arrow, text, .npy, .npz, .bin), a folder of images or in the layout of a Hub data set, a Hub id (or
    id:config), a dict of columns in memory, or a datasets.Dataset or DatasetDict. What the columns are called:

    * ``features`` (N, F) float32: the numeric columns of a table side by side;
    * ``image`` (N, 3, S, S) float32 in [0, 1], with ``image_size`` S;
    * ``label`` (N,) int64: a column of class labels, or one called label, labels, class, target or y;
    * ``target`` (N,) float32: numbers called target or y, more than 50 different ones and than a tenth of the rows;
    * ``tokens`` (N, length + 1) int64, with ``length``: a text file's bytes, a .bin of uint16 or a .npy of integers
      cut into windows that overlap by one, held out at the end;
    * all others keep their names.

    ``columns`` chooses instead, as in ``{"features": ["height", "width"], "label": "species"}``. Which examples are
    held out depends on (``split_seed``, index) alone, the same share of each class; with ``split_seed`` None all are
    kept, as for prediction: then the label and the target that ``columns`` names may be missing, and one class will do.
    Raises InputError for what cannot be read, naming file, column and row; a broken training image only when it is
    read, since ``--skip-bad`` may replace it.
    """
    arrays.check(columns)
    if isinstance(source, Mapping) and not hasattr(source, "num_rows"):  # a DatasetDict has one for each split
        return _from_arrays(source, columns, "the columns given", split_seed, val_share)
    if not isinstance(source, str | Path):
        return to_splits(files.given(source), "the dataset given", columns, image_size, split_seed, val_share)
    name, path = str(source), Path(source).expanduser()
    if length is not None:
        return tokens.load(name, length, split_seed, val_share)
    if name in builtin.NAMES:
        data = builtin.load(name, image_size)
        if columns is not None:
            data.train = arrays.chosen(data.train, columns, name)
        return with_held_out(data, split_seed, val_share)
    if path.suffix.lower() in ARRAYS:
        return _from_arrays(arrays.read(path), columns, name, split_seed, val_share)
    folder, _, config = str(path).partition(":")
    if config and Path(folder).is_dir():
        tables = files.read(Path(folder), config)
    else:
        tables = files.read(path) if path.exists() else files.download(name)
    return to_splits(tables, name, columns, image_size, split_seed, val_share)


def _from_arrays(
    found: Mapping[str, Any],
    columns: Mapping[str, str | Sequence[str]] | None,
    where: str,
    split_seed: int | None,
    val_share: float,
) -> Data:
    if columns is not None and split_seed is None:
        columns = arrays.without_missing_labels(columns, found)
    train = arrays.chosen(found, columns, where)
    try:
        data = Data(train=train)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return with_held_out(arrays.with_whole_labels(data, where), split_seed, val_share)


__all__ = ["InputError", "load"]

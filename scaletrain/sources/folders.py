"""What lies in a folder: which files are data, which split each belongs to, and images in folders named by class."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaletrain.errors import InputError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
IMAGES = (".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that give the images beside them columns, as the Hub's image folders have them."""
BESIDE = ("__MACOSX", "__pycache__", "dataset_infos.json")
ABOUT = (".md", ".txt", ".rst", ".pdf")
"""Files about the data, which nobody misses."""


def listed(folder: Path, inside: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the files in and below ``folder`` by their path inside it, in order; links are followed.

    What is hidden is left out.
    """
    own = os.path.realpath(folder / inside)
    if own in above:
        return  # a link to a folder that it lies in
    for entry in sorted(os.scandir(folder / inside), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name in BESIDE:
            continue
        if entry.is_dir():
            yield from listed(folder, f"{inside}{entry.name}/", (*above, own))
        else:
            yield inside + entry.name


def by_split(names: Sequence[str], folder: Path, *, file_names: bool) -> tuple[dict[str, list[str]], int]:
    """Divide files into train, val and test where all their folders are named for one; else all are train.

    With ``file_names`` the files' own names count too, as in train-00000-of-00002.parquet or iris_test.csv. Folders
    around everything do not matter. Also returns how many folders of each path say nothing about a class. Raises
    InputError where only some are named for a split, but those for several.
    """
    parts = [name.split("/") for name in names]
    around = 0
    while all(len(one) > around + 1 and one[around] == parts[0][around] for one in parts):
        if parts[0][around].lower() in SPLITS:
            break
        around += 1
    splits: dict[str | None, list[str]] = {}
    for name, one in zip(names, parts, strict=True):
        split = SPLITS.get(one[around].lower()) if len(one) > around + 1 else None
        splits.setdefault(split or (_split_of(one[-1]) if file_names else None), []).append(name)
    if None not in splits:
        return {split: found for split, found in splits.items() if split is not None}, around + 1
    if len(splits) > 2:
        raise InputError(
            f"{folder}: some of it is named for a split, as {splits[next(filter(None, splits))][0]}, and some is not, "
            f"as {splits[None][0]}; name all of it train, val or test, or move the rest elsewhere"
        )
    return {"train": list(names)}, 0


def _split_of(name: str) -> str | None:
    known = re.fullmatch(rf"(?:.*[-_ ])?({'|'.join(SPLITS)})(?:[-_]\d.*)?", name.partition(".")[0].lower())
    return SPLITS[known[1]] if known else None


def images(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the images as a datasets.Dataset for each split: ``image``, and ``label`` by the folder each lies in.

    Raises InputError for images that lie beside the folders of classes.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    splits, outer = by_split(names, folder, file_names=False)
    found = {split: _labels(folder, files, outer) for split, files in splits.items()}
    classes = sorted({label for labels in found.values() for label in labels if label is not None})
    places = {label: place for place, label in enumerate(classes)}
    root, tables = str(folder.absolute()), {}
    for split, files in splits.items():
        columns: dict[str, Any] = {"image": [f"{root}/{name}" for name in files]}
        features = {"image": Image()}
        if classes:
            columns["label"] = [-1 if label is None else places[label] for label in found[split]]
            features["label"] = ClassLabel(names=classes)
        tables[split] = Dataset.from_dict(columns, features=Features(features))
    return tables


def _labels(folder: Path, names: Sequence[str], outer: int) -> list[str | None]:
    parts = [name.split("/")[outer:] for name in names]
    other = next((place for place, one in enumerate(parts) if len(one) != len(parts[0])), None)
    if other is not None:
        raise InputError(
            f"{folder}: images lie at different depths, as {names[0]} and {names[other]}; "
            "put each into the folder of its class"
        )
    return [one[-2] if len(one) > 1 else None for one in parts]


def tell_left_out(folder: Path, names: Sequence[str], used: Sequence[str]) -> None:
    """Warn of files that are no part of the data."""
    known = set(used)
    others = [name for name in names if name not in known and not name.lower().endswith((*ABOUT, "license"))]
    if others:
        warnings.warn(f"{folder}: {len(others)} files are of another kind and left out, as {others[0]}", stacklevel=2)

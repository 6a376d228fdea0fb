"""Tables, texts and folders through Hugging Face datasets: local, or from the Hub."""

import difflib
import glob
import gzip
import hashlib
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scaletrain.errors import InputError
from scaletrain.sources import folders

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
HASHED_BYTES = 64 << 20
"""Bytes of the files, from their beginnings and ends, that tell whether they were converted before."""
CONNECT_SECONDS = 3

Tables = dict[str, Any]
"""A datasets.Dataset for each split."""


def suffix_of(name: str | Path) -> str:
    """Return the suffix that says what a file is: in lower case, that of x.csv.gz is .csv."""
    path = Path(str(name).lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read(path: Path, config: str | None = None) -> Tables:
    """Read a file or folder: its splits by name. ``config`` is one of those that a folder's README.md declares.

    Raises InputError with the reason.
    """
    if path.is_dir():
        return _splits(_reading(str(path), lambda datasets: _folder(path, config, datasets)), str(path))
    if suffix_of(path) not in FORMATS:
        hint = "; give length, the tokens of an example" if suffix_of(path) == ".bin" else ""
        raise InputError(
            f"{path}: '{path.suffix}' is not a known kind of file; known are {', '.join(FORMATS)}, .npy, .npz{hint}"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    kind = FORMATS[suffix_of(path)]
    return _splits(_reading(str(path), lambda datasets: _tables(kind, {"train": [path]}, datasets)), str(path))


def download(name: str) -> Tables:
    """Get a data set from the Hub, or from its cache where the Hub cannot be reached; ``name`` is an id or id:config.

    Raises InputError within seconds where neither has it.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or suffix_of(name) in {*FORMATS, ".bin"}
    if looks_local:
        raise InputError(f"{name}: no such file or folder")
    offline = not _hub_is_reachable()
    if offline:
        _go_offline()
    try:
        return _splits(_reading(name, lambda datasets: _load(*name.split(":", 1))), name)
    except InputError as error:
        if not offline:
            raise
        from scaletrain.sources.builtin import NAMES

        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "go online, or give the path of a local copy"
        raise InputError(
            f"'{name}' is neither built in ({', '.join(NAMES)}) nor a file here, and the Hub cannot be reached; {hint}"
        ) from error


def given(source: Any) -> Tables:
    """Return the splits of a datasets.Dataset or DatasetDict. Raises InputError for what is none."""
    what = type(source)
    if not what.__module__.startswith("datasets.") or what.__name__ not in ("Dataset", "DatasetDict"):
        raise InputError(
            f"load was given a {what.__name__}; give a name, a path, a dict of columns or a datasets.Dataset"
            + ("; Dataset.from_pandas(frame) makes one" if what.__name__ == "DataFrame" else "")
        )
    tables = _splits(source, "the dataset given")
    if any(table.format["type"] == "custom" for table in tables.values()):
        raise InputError("the dataset given has a transform, which load would leave out; give it as Data(train=...)")
    return tables


def _folder(path: Path, config: str | None, datasets: Any) -> Any:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))
    names = list(folders.listed(path))
    if not names:
        raise InputError(f"{path} is an empty folder")
    readme = path / "README.md"
    if readme.exists() and re.match(r"---\n(?:.*\n)*?configs:", readme.read_text(encoding="utf-8", errors="replace")):
        return _load(str(path), *([config] if config else []))  # it says itself what its splits are
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault("image" if suffix_of(name) in folders.IMAGES else FORMATS.get(suffix_of(name), ""), []).append(
            name
        )
    tables = {kind: found for kind, found in kinds.items() if kind not in ("image", "text", "")}
    if "image" in kinds and not {"parquet", "arrow"} & set(tables):
        return _images(path, names, kinds["image"], datasets)
    if len(tables) > 1:
        raise InputError(
            f"{path} holds tables of several kinds, as {' and '.join(found[0] for found in tables.values())}; "
            "leave one kind, or give the path of a file"
        )
    if not tables and "text" not in kinds:
        return _load(str(path))
    kind, found = next(iter(tables.items())) if tables else ("text", kinds["text"])
    folders.tell_left_out(path, names, found)
    splits, _ = folders.by_split(found, path, file_names=True)
    return _tables(kind, {split: [path / name for name in part] for split, part in splits.items()}, datasets)


def _images(path: Path, names: Sequence[str], images: Sequence[str], datasets: Any) -> Any:
    described = [name for name in names if name.rpartition("/")[2] in folders.METADATA]
    folders.tell_left_out(path, names, [*images, *described])
    if not described:
        return folders.images(path, images)
    splits, _ = folders.by_split([*images, *(name for name in described if "/" in name)], path, file_names=False)
    whole = [name for name in described if "/" not in name]
    return _tables(
        "imagefolder", {split: [path / name for name in [*part, *whole]] for split, part in splits.items()}, datasets
    )


def _tables(kind: str, splits: Mapping[str, Sequence[Path]], datasets: Any) -> Tables:
    """Read files of one kind, which datasets converts once and keeps; by their content too, not by time alone."""
    paths = [path for part in splits.values() for path in part]
    options = {"sep": _separator(paths[0])} if kind == "csv" else {}
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "scaletrain" / _content(paths)
    tables = {}
    for split, part in splits.items():  # each by itself: a test split may lack the label
        files = [glob.escape(str(path.resolve())) for path in part]
        tables[split] = _load(kind, data_files={"train": files}, split="train", cache_dir=str(cache), **options)
    return tables


def _separator(path: Path) -> str:
    """Return what separates the columns in the first line of a CSV file."""
    if suffix_of(path) == ".tsv":
        return "\t"
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as file:
        header = file.readline()
    return max(",", "\t", ";", "|", key=header.count)


def _content(paths: Sequence[Path]) -> str:
    """Hash the sizes of files and up to HASHED_BYTES of their beginnings and ends."""
    digest, most = hashlib.sha256(), HASHED_BYTES // len(paths) // 2
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} ".encode())
            for start in (0, max(0, size - most)):
                file.seek(start)
                digest.update(file.read(most))
    return digest.hexdigest()[:16]


def _load(*args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset

    return load_dataset(*args, **kwargs)


def _reading(what: str, read: Callable[[Any], Any]) -> Any:
    import datasets  # 1.8 s to import

    with _quietly(datasets):
        try:
            return read(datasets)
        except InputError:
            raise
        except Exception as error:  # datasets raises whatever its readers do
            cause: BaseException = error
            while cause.__cause__ is not None or cause.__context__ is not None:
                cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]  # one of them is
            configs = re.search(r"available configs: (\[.*\])", str(cause))
            if configs:
                raise InputError(f"{what} has the configs {configs[1]}; name one, as '{what}:NAME'") from error
            line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise InputError(f"cannot read {what}: {line[:300]}") from error


def _splits(found: Any, where: str) -> Tables:
    """Name the splits train, val and test, whatever the source calls them."""
    tables = dict(found) if hasattr(found, "keys") else {"train": found}
    renamed = {folders.SPLITS.get(name, name): table for name, table in tables.items()}
    if "train" not in renamed and len(renamed) == 1:
        renamed = {"train": next(iter(renamed.values()))}
    if "train" not in renamed:
        raise InputError(f"{where} has no split called train, but {', '.join(map(repr, tables))}")
    for name, table in renamed.items():
        if name in ("train", "val", "test") and len(table) == 0:
            raise InputError(f"{where}: the split {name} is empty; it needs at least one example")
    return renamed


@contextmanager
def _quietly(datasets: Any) -> Any:
    """Read without progress bars and warnings of their own."""
    import logging

    shown = datasets.utils.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(shown[0])
        if shown[1]:
            datasets.enable_progress_bars()


def _hub_is_reachable() -> bool:
    """Whether somebody answers at the Hub's address; the library itself would try for 24 seconds."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _go_offline() -> None:
    """Let datasets look into its cache alone."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True

"""Tables, texts and folders through Hugging Face datasets: local, or from the Hub."""

import difflib
import os
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scaletrain.errors import InputError

FORMATS = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
CONNECT_SECONDS = 3

Tables = dict[str, Any]
"""A datasets.Dataset for each split."""


def read(path: Path) -> Tables:
    """Read a file or folder: its splits by name. Raises InputError with the reason."""
    if path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"{path} is an empty folder")
        saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
        tables = _splits(_reading(str(path), lambda datasets: (datasets.load_from_disk if saved else _load)(str(path))))
        _check_classes(path, tables)
        return tables
    if path.suffix not in FORMATS:
        raise InputError(
            f"{path}: '{path.suffix}' is not a known kind of file; known are {', '.join(FORMATS)}, .npy, .npz"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    kind, options = FORMATS[path.suffix]
    return _splits(_reading(str(path), lambda datasets: _load(kind, data_files=str(path.resolve()), **options)))


def download(name: str) -> Tables:
    """Get a data set from the Hub, or from its cache where the Hub cannot be reached.

    Raises InputError within seconds where neither has it.
    """
    looks_local = (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in {*FORMATS, ".npy", ".npz"}
    )
    if looks_local:
        raise InputError(f"{name}: no such file or folder")
    offline = not _hub_is_reachable()
    if offline:
        _go_offline()
    try:
        return _splits(_reading(name, lambda datasets: _load(name)))
    except InputError as error:
        if not offline:
            raise
        from scaletrain.sources.builtin import NAMES

        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "go online, or give the path of a local copy"
        raise InputError(
            f"'{name}' is neither built in ({', '.join(NAMES)}) nor a file here, and the Hub cannot be reached; {hint}"
        ) from error


def _check_classes(path: Path, tables: Tables) -> None:
    """Raise InputError for images that all lie in one folder inside: datasets takes that for no label at all."""
    inside = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    kinds = {type(feature).__name__ for feature in tables["train"].features.values()}
    if kinds == {"Image"} and len(inside) == 1 and inside[0].is_dir() and inside[0].name not in SPLITS:
        raise InputError(f"{path} has one class, {inside[0].name!r}; there is nothing to tell apart")


def _load(*args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset

    return load_dataset(*args, **kwargs)


def _reading(what: str, read: Callable[[Any], Any]) -> Any:
    import datasets  # 1.8 s to import

    with _quietly(datasets):
        try:
            return read(datasets)
        except Exception as error:  # datasets raises whatever its readers do
            cause: BaseException = error
            while cause.__cause__ is not None or cause.__context__ is not None:
                cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]  # one of them is
            line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise InputError(f"cannot read {what}: {line[:300]}") from error


def _splits(found: Any) -> Tables:
    """Name the splits train, val and test, whatever the source calls them."""
    tables = dict(found) if hasattr(found, "keys") else {"train": found}
    names = {"validation": "val", "valid": "val", "dev": "val"}
    renamed = {names.get(name, name): table for name, table in tables.items()}
    if "train" not in renamed and len(renamed) == 1:
        renamed = {"train": next(iter(renamed.values()))}
    if "train" not in renamed:
        raise InputError(f"there is no split called train among {', '.join(map(repr, tables))}")
    for name, table in renamed.items():
        if name in ("train", "val", "test") and len(table) == 0:
            raise InputError(f"the split {name} is empty; it needs at least one example")
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

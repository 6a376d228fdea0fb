"""Built-in data that needs no network: scikit-learn's tables and handwritten digits, Python's own source code."""

import hashlib
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from scaletrain.data import Data
from scaletrain.errors import InputError

TABLES = ("digits", "iris", "wine", "breast_cancer", "diabetes")
TEXT = "stdlib"
NAMES = (*TABLES, TEXT)
PASSAGE = 400
"""Characters of a passage of the standard library, at most."""


def load(name: str, image_size: int | None = None) -> Data:
    """Return all examples of a built-in set as ``train``.

    Tables: ``features`` (N, F) float32 as they come, unscaled, with ``label`` (N,) int64, or for diabetes
    ``target`` (N,) float32. With ``image_size``, digits are images: ``image`` (N, 3, S, S) float32 in [0, 1].
    stdlib: passages as dicts of ``text`` and ``label``, the package that the passage comes from.
    """
    if image_size is not None and name != "digits":
        raise InputError(f"'{name}' has no images; the built-in images are digits")
    if name == TEXT:
        return passages()
    from sklearn import datasets  # 1.8 s to import

    bunch = getattr(datasets, f"load_{name}")()
    features = torch.from_numpy(bunch.data).float()
    if name == "diabetes":
        return Data(train={"features": features, "target": torch.from_numpy(bunch.target).float()})
    label = torch.from_numpy(bunch.target).long()
    inputs = {"features": features} if image_size is None else {"image": _images(features, image_size)}
    return Data(train={**inputs, "label": label}, classes=[str(cls) for cls in bunch.target_names])


def passages() -> Data:
    """Cut the packages of the standard library into passages of whole lines, labelled by package."""
    found: dict[str, list[str]] = {}
    for package, text in _library():
        if package:
            found.setdefault(package, []).extend(_cut(text))
    classes = sorted(package for package, parts in found.items() if len(parts) >= 200)
    rows = [{"text": text, "label": label} for label, package in enumerate(classes) for text in found[package]]
    return Data(train=rows, classes=classes)


def source_bytes() -> NDArray[np.uint8]:
    """Return the source code of the standard library, file after file, as (N,) uint8 mapped into memory.

    It is read once and kept below XDG_CACHE_HOME (~/.cache); where that cannot be written, it is read each time.
    """
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files()]
    digest = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaletrain"
        kept = folder / f"stdlib-{platform.python_version()}-{digest}.txt"
        if not kept.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(kept, _joined())
        return np.memmap(kept, dtype=np.uint8, mode="r").view(np.ndarray)
    except (OSError, RuntimeError):  # a full or read-only disk; no home
        return np.frombuffer(_joined(), dtype=np.uint8)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whoever looks, after a power cut too, finds all of it or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _joined() -> bytes:
    return "\n".join(text for _, text in _library()).encode()


def _library() -> Iterator[tuple[str, str]]:
    """Yield the package ("" for a module of its own) and text of each file."""
    for path in _files():
        inside = path.relative_to(_root()).parts
        yield inside[0] if len(inside) > 1 else "", path.read_text(encoding="utf-8", errors="replace")


def _files() -> list[Path]:
    """Return the files of the standard library in order, but for tests and what was installed."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
    found = []
    for folder, inside, names in os.walk(_root()):
        inside[:] = [name for name in inside if name not in left_out and not name.startswith("config-")]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.parts)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _cut(text: str) -> Iterator[str]:
    passage = ""
    for line in text.splitlines(keepends=True):
        if passage and len(passage) + len(line) > PASSAGE:
            yield passage
            passage = ""
        passage += line
    if passage.strip():
        yield passage


def _images(features: Tensor, size: int) -> Tensor:
    """Scale the (N, 64) pixels 0..16 of the digits to (N, 3, size, size) in [0, 1]."""
    grey = features.view(-1, 1, 8, 8) / 16
    return interpolate(grey, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()

"""What examples and data sets hold, as hashes that are the same in every process and every run."""

import hashlib
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np
import torch
from torch import Tensor

from scaletrain.data import Data, Part, is_stream
from scaletrain.order import digest_of
from scaletrain.randomness import random_states, seed_all, set_random_states

EXACT = (str, bytes, bytearray, int, float, complex, type(None), date, time, timedelta, Decimal, PurePath, UUID)
"""What its repr says completely. Others may leave parts out, or name a place in memory."""
READ = 4
"""Examples of a map-style dataset by which it is told from another."""


def content_hash(example: Any) -> str:
    """Hash tensors, arrays, images, numbers, text and bytes, and dicts, lists and tuples of them.

    Raises TypeError for anything else.
    """
    digest = hashlib.sha256()
    _add(example, digest)
    return digest.hexdigest()


def _add(value: Any, digest: "hashlib._Hash") -> None:
    if isinstance(value, Mapping):
        digest.update(f"dict {len(value)} ".encode())
        for name, part in value.items():
            _add(name, digest)
            _add(part, digest)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)} ".encode())
        for part in value:
            _add(part, digest)
    elif isinstance(value, Tensor) and value.layout == torch.strided:
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "__array_interface__"):  # arrays and scalars of NumPy, images of PIL
        array = np.asarray(value)
        if array.dtype.hasobject:
            _add(array.tolist(), digest)
        else:
            digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    elif isinstance(value, EXACT):
        digest.update(f"{type(value).__name__} {value!r} ".encode(errors="surrogatepass"))
    else:
        raise TypeError(f"a {type(value).__name__}")


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

"""What an example holds, as a hash that is the same in every process and every run."""

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

EXACT = (str, bytes, bytearray, int, float, complex, type(None), date, time, timedelta, Decimal, PurePath, UUID)
"""What its repr says completely. Others may leave parts out, or name a place in memory."""


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

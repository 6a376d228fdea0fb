"""Tokens in a row, cut into windows: text as bytes, or numbers in a file that is mapped into memory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaletrain.data import Data
from scaletrain.errors import InputError
from scaletrain.sources import arrays, builtin
from scaletrain.sources.files import FORMATS, suffix_of
from scaletrain.sources.folders import IMAGES

NO_TOKENS = {*FORMATS, *IMAGES, ".npz", ".gz", ".zip", ".pt", ".pkl", ".safetensors", ".h5"}


class Windows:
    """Windows of ``length`` + 1 tokens, each beginning with the last token of the one before.

    A window holds inputs and targets: ``tokens[:-1]`` and ``tokens[1:]``; every token but the first is a target
    exactly once. What is left over at the end is not used.
    """

    def __init__(self, tokens: NDArray[np.integer], length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"tokens": self.__getitems__([index])["tokens"][0]}

    def fingerprint(self) -> str:
        """Hash 64 windows."""
        rows = self.__getitems__(np.linspace(0, len(self) - 1, 64).astype(np.int64).tolist())["tokens"]
        return hashlib.sha256(rows.numpy().tobytes()).hexdigest()

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return ``tokens`` (B, length + 1) int64."""
        starts = np.asarray(indices, dtype=np.int64) * self.length
        windows = np.empty((len(starts), self.length + 1), dtype=np.int64)
        for row, start in enumerate(starts):
            windows[row] = self.tokens[start : start + self.length + 1]
        return {"tokens": torch.from_numpy(windows)}


def load(name: str, length: int, split_seed: int | None, val_share: float) -> Data:
    """Return windows of ``length`` + 1 tokens, the last ``val_share`` of the tokens held out.

    Raises InputError where the tokens do not fill a window.
    """
    if length < 1:
        raise InputError(f"length is {length}; it is the number of tokens of an example, at least 1")
    if split_seed is not None and not 0 < val_share < 1:
        raise InputError(f"val_share is {val_share}; it is a share of the tokens, between 0 and 1")
    tokens = _tokens(name)
    held_out = 0 if split_seed is None else round(val_share * len(tokens))
    parts = [tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]]
    windows = [Windows(part, length) for part in parts if len(part)]
    for part, which in zip(windows, ("", "held-out "), strict=False):
        if len(part) == 0:
            raise InputError(
                f"{name}: {len(part.tokens)} {which}tokens do not fill a window of {length} + 1; use a smaller length "
                "(--context) or another share to hold out"
            )
    if not windows:
        raise InputError(f"{name} is empty; it needs at least {length + 1} tokens")
    return Data(train=windows[0], val=windows[1] if len(windows) > 1 else None)


def _tokens(name: str) -> NDArray[np.integer]:
    path = Path(name).expanduser()
    if name == builtin.TEXT:
        return builtin.source_bytes()
    if not path.is_file():
        raise InputError(f"{name}: no such file; tokens come from a text, .bin or .npy file, or from '{builtin.TEXT}'")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".bin", ".npy") and (suffix in NO_TOKENS or suffix_of(path) in NO_TOKENS):
        raise InputError(f"{name} holds no tokens; they come from a text, a .bin or a .npy file")
    if path.stat().st_size == 0:
        raise InputError(f"{name} is empty")
    if suffix == ".bin" and path.stat().st_size % 2:
        raise InputError(f"{name} has an odd number of bytes; a .bin holds tokens of two bytes each")
    if suffix != ".npy":
        return np.memmap(path, dtype=np.uint16 if suffix == ".bin" else np.uint8, mode="r").view(np.ndarray)
    tokens = arrays.open_npy(path)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; tokens are one row of integers")
    return tokens

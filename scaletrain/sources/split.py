"""Which examples are held out: a function of (seed, index), however many there are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaletrain.data import Data, Part
from scaletrain.errors import InputError
from scaletrain.order import Given, Indices, Shuffled
from scaletrain.permutation import seeds_for

RANKED = 2_000_000
"""Up to so many examples are ranked within their class; beyond, chance gives each class its share."""
COPIED_BYTES = 256 << 20
"""Columns of up to so many bytes are cut into two; larger ones are read through a map of their rows."""


@dataclass(frozen=True)
class Rest:
    """The numbers that a shuffle of ``n`` shows from place ``first`` on: a part that stores nothing."""

    n: int
    seed: int
    first: int

    def __call__(self, positions: Indices, /) -> Indices:
        return Shuffled(self.n, self.seed)(positions + self.first)


def with_held_out(data: Data, seed: int | None, share: float, labels: NDArray[np.int64] | None = None) -> Data:
    """Return ``data`` with ``share`` of its training examples as ``val``, unless it has some or ``seed`` is None.

    ``labels`` are the classes of the training examples, by default the column ``label``.
    """
    if seed is None or data.val is not None:
        return data
    if not 0 < share < 1:
        raise InputError(f"val_share is {share}; it is a share of the examples, between 0 and 1")
    examples = data.train
    in_memory = isinstance(examples, Mapping)
    n = len(next(iter(examples.values()))) if in_memory else len(examples)
    if in_memory and labels is None and "label" in examples:
        column = examples["label"]
        labels = None if column.is_floating_point() or column.ndim > 1 else column.numpy()
    if n > RANKED:
        val_size = round(share * n)
        parts = [
            Part(examples, Rest(n, seed, first), size) for first, size in ((val_size, n - val_size), (0, val_size))
        ]
    else:
        held_out = hold_out(np.zeros(n, np.int64) if labels is None else labels, share, seed)
        parts = [
            Part(examples, Given(rows), len(rows)) for rows in (np.flatnonzero(~held_out), np.flatnonzero(held_out))
        ]
    if not all(map(len, parts)):
        raise InputError(
            f"{n} examples are too few to hold out {share:.0%} of them; give validation examples of your own"
        )
    if in_memory and sum(column.nbytes for column in examples.values()) <= COPIED_BYTES:
        train, val = (
            {name: column[part.rows(np.arange(part.n))] for name, column in examples.items()} for part in parts
        )
        return replace(data, train=train, val=val)
    return replace(data, train=parts[0], val=parts[1])


def hold_out(label: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Choose ``share`` of each class: a (N,) mask that depends on (seed, index) alone, not on other draws."""
    rank = seeds_for(seed, np.arange(len(label)))
    mask = np.zeros(len(label), dtype=bool)
    for cls in np.unique(label):
        members = np.flatnonzero(label == cls)
        order = np.argsort(rank[members], kind="stable")
        mask[members[order[: round(share * len(members))]]] = True
    return mask

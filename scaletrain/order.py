"""Which examples make step k: integer arithmetic, nothing stored.

Training reads an endless stream. Position ``p`` lies in epoch ``p // n`` at place ``p % n``, and a step
takes the next ``batch_size`` positions. An *order* maps positions to example indices as a pure function,
so the whole state of the data is one integer, and resuming anywhere, on any number of processes, is
arithmetic.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scaletrain.errors import InputError
from scaletrain.permutation import as_words, mix, permute, seed_for

Indices = NDArray[np.int64]


class Order(Protocol):
    """Map positions of the endless stream, int64 of any shape, to example indices of the same shape."""

    @property
    def n(self) -> int:
        """Examples in an epoch."""
        ...

    def __call__(self, positions: Indices, /) -> Indices: ...


def digest_of(order: Order) -> str:
    """Say in one line what tells ``order`` from others: its own ``digest()``, else a hash of a sample of positions."""
    if hasattr(order, "digest"):
        return str(order.digest())
    positions = np.concatenate([np.arange(64), np.geomspace(64, 2**40, 64).astype(np.int64)])
    return f"{type(order).__name__} {order.n} {_hash(order(positions))}"


@dataclass(frozen=True)
class Shuffled:
    """Every example exactly once per epoch, in an order of its own for each (seed, epoch).

    A Feistel network over pairs (left < a, right < b) with a * b just above n permutes a * b numbers; those
    that land at n or above walk on until they land below it (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002). About 40 ns an index and no memory, for n from 64 to 2**62 (benchmarks/order_cost.py).
    """

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_n(self)

    def digest(self) -> str:
        """Say what the order is."""
        return f"shuffled {self.n} {self.seed}"

    def __call__(self, positions: Indices, /) -> Indices:
        epoch, place = np.divmod(positions, self.n)
        if epoch.size and epoch.min() == epoch.max():
            epoch = epoch.ravel()[:1]  # one key serves the whole block
        key = mix(as_words(epoch) + np.uint64(seed_for(self.seed, 0)))
        return permute(as_words(place), self.n, key).astype(np.int64)


@dataclass(frozen=True)
class Sequential:
    """The examples as they lie, epoch after epoch."""

    n: int

    def __post_init__(self) -> None:
        _check_n(self)

    def digest(self) -> str:
        """Say what the order is."""
        return f"sequential {self.n}"

    def __call__(self, positions: Indices, /) -> Indices:
        return positions % self.n


@dataclass(frozen=True, eq=False)
class Given:
    """The examples in the order of ``indices``, (N,) integers, again and again. Raises InputError for anything else."""

    indices: Indices

    def __post_init__(self) -> None:
        indices = np.asarray(self.indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            mask = "; of a mask give np.flatnonzero(mask)" if indices.dtype.kind == "b" else ""
            raise InputError(
                f"Given has {indices.dtype} of shape {indices.shape}; it takes one row of example numbers{mask}"
            )
        object.__setattr__(self, "indices", indices.astype(np.int64, copy=False))

    def digest(self) -> str:
        """Say what the order is, by a hash of all of it."""
        return f"given {self.n} {_hash(self.indices)}"

    @property
    def n(self) -> int:
        """Examples in an epoch."""
        return len(self.indices)

    def __call__(self, positions: Indices, /) -> Indices:
        chosen: Indices = self.indices[positions % len(self.indices)]
        return chosen


@dataclass(frozen=True, eq=False)
class Weighted:
    """Draw with replacement, each example in proportion to its weight: rare classes seen as often as common ones."""

    weights: NDArray[np.floating]
    seed: int = 0
    _upper: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=np.float64)
        if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise InputError("weights must be one row of finite numbers >= 0 with a sum above 0")
        upper = np.cumsum(weights)
        object.__setattr__(self, "_upper", upper / upper[-1])

    @classmethod
    def balanced(cls, labels: Indices, seed: int = 0) -> "Weighted":
        """Draw every class equally often, whatever its share of ``labels``, (N,) integers."""
        _, places, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
        return cls(1.0 / counts[places], seed)

    def digest(self) -> str:
        """Say what the order is, by a hash of all weights."""
        return f"weighted {self.n} {self.seed} {_hash(np.asarray(self.weights, dtype=np.float64))}"

    @property
    def n(self) -> int:
        """Examples in an epoch: as many as there are, though not each once."""
        return len(self._upper)

    def __call__(self, positions: Indices, /) -> Indices:
        words = mix(as_words(positions) + np.uint64(seed_for(self.seed, 1)))
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
        drawn: Indices = np.searchsorted(self._upper, uniform, side="right").astype(np.int64)
        return drawn


@dataclass(frozen=True, eq=False)
class Checked:
    """A user's own order of ``examples`` examples, each block of which is held to what an order must return."""

    order: Order
    examples: int

    @property
    def n(self) -> int:
        """Examples in an epoch."""
        return self.order.n

    def digest(self) -> str:
        """Say what the order is."""
        return digest_of(self.order)

    def __call__(self, positions: Indices, /) -> Indices:
        found = np.asarray(self.order(positions))
        if found.dtype.kind not in "iu" or found.shape != positions.shape:
            raise InputError(
                f"the order returns {found.dtype} of shape {found.shape} for positions of shape {positions.shape}; it "
                "must return integers of the same shape"
            )
        check_range(found, self.examples)
        return found.astype(np.int64, copy=False)


def checked(order: Order, examples: int) -> Order:
    """Return ``order`` if it can be one of so many examples. Raises InputError where it cannot."""
    if isinstance(order, Shuffled | Sequential | Weighted):
        if order.n != examples:
            raise InputError(f"the order {type(order).__name__} is of {order.n:,} examples, but there are {examples:,}")
        return order
    if not callable(order) or not isinstance(getattr(order, "n", None), int | np.integer):
        raise InputError(
            f"order is a {type(order).__name__}; it must have n, the examples of an epoch, and map positions to "
            "example numbers when it is called"
        )
    if order.n < 1:
        raise InputError(f"the order has {order.n} examples; it needs at least one")
    if not isinstance(order, Given):
        return Checked(order, examples)
    check_range(order.indices, examples)
    return order


def check_range(indices: Indices, examples: int) -> None:
    """Raise InputError unless all ``indices`` are of one of so many examples."""
    low, high = (int(indices.min()), int(indices.max())) if indices.size else (0, 0)
    if low < 0 or high >= examples:
        raise InputError(
            f"the order asks for example {low if low < 0 else high}, but there are {examples:,}: 0 to {examples - 1:,}"
        )


def _check_n(order: Shuffled | Sequential) -> None:
    if not isinstance(order.n, int | np.integer) or order.n < 1:
        raise InputError(f"{type(order).__name__} has n {order.n}; it is the number of examples, at least 1")


def _hash(numbers: NDArray[Any]) -> str:
    little = np.ascontiguousarray(numbers, dtype=numbers.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()

"""Which examples make step k: integer arithmetic, nothing stored.

Training reads an endless stream. Position ``p`` lies in epoch ``p // n`` at place ``p % n``, and a step
takes the next ``batch_size`` positions. An *order* maps positions to example indices as a pure function,
so the whole state of the data is one integer, and resuming anywhere, on any number of processes, is
arithmetic.
"""

from dataclasses import dataclass, field
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scaletrain.errors import InputError

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

STRIDE = 0x9E3779B97F4A7C15
"""An odd number near 2**64 / the golden ratio: its multiples, modulo 2**64, visit every number once."""
MASK = (1 << 64) - 1


class Order(Protocol):
    """Map positions of the endless stream, int64 of any shape, to example indices of the same shape."""

    @property
    def n(self) -> int:
        """Examples in an epoch."""
        ...

    def __call__(self, positions: Indices, /) -> Indices: ...


@dataclass(frozen=True)
class Shuffled:
    """Every example exactly once per epoch, in an order of its own for each (seed, epoch).

    A Feistel network over pairs (left < a, right < b) with a * b just above n permutes a * b numbers; those
    that land at n or above walk on until they land below it (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002). About 40 ns an index and no memory, for n from 64 to 2**62 (benchmarks/order_cost.py).
    """

    n: int
    seed: int = 0

    def __call__(self, positions: Indices, /) -> Indices:
        epoch, place = np.divmod(positions, self.n)
        if epoch.size and epoch.min() == epoch.max():
            epoch = epoch.ravel()[:1]  # one key serves the whole block
        key = _mix(_words(epoch) + np.uint64(seed_for(self.seed, 0)))
        return _permute(_words(place), self.n, key).astype(np.int64)


@dataclass(frozen=True)
class Sequential:
    """The examples as they lie, epoch after epoch."""

    n: int

    def __call__(self, positions: Indices, /) -> Indices:
        return positions % self.n


@dataclass(frozen=True, eq=False)
class Given:
    """The examples in the order of ``indices``, again and again."""

    indices: Indices

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

    @property
    def n(self) -> int:
        """Examples in an epoch: as many as there are, though not each once."""
        return len(self._upper)

    def __call__(self, positions: Indices, /) -> Indices:
        words = _mix(_words(positions) + np.uint64(seed_for(self.seed, 1)))
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
        drawn: Indices = np.searchsorted(self._upper, uniform, side="right").astype(np.int64)
        return drawn


@dataclass(frozen=True, eq=False)
class Share:
    """What one process reads of each step: shares differ by at most one and partition the step's positions."""

    order: Order
    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Examples of each step that this process reads."""
        return len(range(self.batch_size)[split(self.batch_size, self.world_size)[self.rank]])

    def block(self, first: int, steps: int) -> tuple[Indices, Indices]:
        """Return (positions, example indices), each (steps, size), of the steps from position ``first`` on."""
        part = split(self.batch_size, self.world_size)[self.rank]
        starts = first + self.batch_size * np.arange(steps, dtype=np.int64)
        positions = starts[:, None] + np.arange(part.start, part.stop, dtype=np.int64)
        return positions, self.order(positions)


def split(size: int, parts: int) -> list[slice]:
    """Cut ``range(size)`` into ``parts`` slices whose sizes differ by at most one."""
    return [slice(size * i // parts, size * (i + 1) // parts) for i in range(parts)]


def micro_batch_count(batch_size: int, world_size: int, micro_batch_size: int | None) -> int:
    """Number of micro-batches of every process in every step: enough for the largest share."""
    largest = -(-batch_size // world_size)
    return 1 if micro_batch_size is None else -(-largest // micro_batch_size)


def seed_for(*keys: int) -> int:
    """Hash integers into 64 bits (splitmix64), for generators and orders that depend on nothing else."""
    word = 0
    for key in keys:
        word = (word ^ key) + STRIDE & MASK
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
        word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
        word ^= word >> 31
    return word


def seeds_for(key: int, numbers: Indices) -> Words:
    """Return ``seed_for(key, number)`` for each of ``numbers``."""
    words = (np.uint64(seed_for(key)) ^ _words(numbers)) + np.uint64(STRIDE)
    return _mix(words)


def _permute(places: Words, n: int, key: Words) -> Words:
    a = max(8, isqrt(n - 1) + 1 if n > 1 else 1)  # a smaller square has too few permutations
    b = max(8, -(-n // a))
    shown = _feistel(places, a, b, key)
    outside = np.flatnonzero(shown >= n)  # one in sqrt(n), for n above 64
    key = np.broadcast_to(key, places.shape).ravel()
    shown = shown.ravel()
    while outside.size:
        shown[outside] = _feistel(shown[outside], a, b, key[outside])
        outside = outside[shown[outside] >= n]
    return shown.reshape(places.shape)


def _feistel(numbers: Words, a: int, b: int, key: Words) -> Words:
    """Permute the numbers below a * b, a pair (left < a, right < b) each, in eight keyed rounds."""
    left, right = np.divmod(numbers, np.uint64(b))
    for r in range(8):
        round_key = key + np.uint64(r * STRIDE & MASK)
        half, other, size = (left, right, np.uint64(a)) if r % 2 == 0 else (right, left, np.uint64(b))
        half += _below(other + round_key, size)
        np.minimum(half, half - size, out=half)  # modulo size: the unsigned difference wraps where half < size
    left *= np.uint64(b)
    left += right
    return left


def _below(words: Words, bound: np.uint64) -> Words:
    """Hash ``words`` in place into [0, bound), bound < 2**32, by multiplying and shifting instead of dividing."""
    words = _mix(words)
    words >>= np.uint64(32)
    words *= bound
    words >>= np.uint64(32)
    return words


def _mix(words: Words) -> Words:
    """Apply splitmix64's finalizer in place: every bit of the input changes half the bits of the output."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _words(numbers: Indices) -> Words:
    return numbers.astype(np.uint64)

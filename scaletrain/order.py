"""Which examples make step k: integer arithmetic, nothing stored.

Training reads an endless stream. Position ``p`` lies in epoch ``p // n`` at place ``p % n``, and a step
takes the next ``batch_size`` positions. An *order* maps positions to example indices as a pure function,
so the whole state of the data is one integer, and resuming anywhere, on any number of processes, is
arithmetic.
"""

import hashlib
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Protocol

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
        key = _mix(_words(epoch) + np.uint64(seed_for(self.seed, 0)))
        return _permute(_words(place), self.n, key).astype(np.int64)


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
        words = _mix(_words(positions) + np.uint64(seed_for(self.seed, 1)))
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
        part = part_of(self.batch_size, self.world_size, self.rank)
        return int(part.stop - part.start)

    def block(self, first: int, steps: int) -> tuple[Indices, Indices]:
        """Return (positions, example indices), each (steps, size), of the steps from position ``first`` on."""
        part = part_of(self.batch_size, self.world_size, self.rank)
        starts = first + self.batch_size * np.arange(steps, dtype=np.int64)
        positions = starts[:, None] + np.arange(part.start, part.stop, dtype=np.int64)
        return positions, self.order(positions)


def split(size: int, parts: int) -> list[slice]:
    """Cut ``range(size)`` into ``parts`` slices whose sizes differ by at most one."""
    return [part_of(size, parts, i) for i in range(parts)]


def part_of(size: int, parts: int, i: int) -> slice:
    """Return the slice numbered ``i`` of ``split(size, parts)``, whatever their number."""
    return slice(size * i // parts, size * (i + 1) // parts)


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


def _check_n(order: Shuffled | Sequential) -> None:
    if not isinstance(order.n, int | np.integer) or order.n < 1:
        raise InputError(f"{type(order).__name__} has n {order.n}; it is the number of examples, at least 1")


def _hash(numbers: NDArray[Any]) -> str:
    little = np.ascontiguousarray(numbers, dtype=numbers.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()


def _words(numbers: Indices) -> Words:
    return numbers.astype(np.uint64)

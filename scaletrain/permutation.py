"""Keyed hashing and permutation of integers: splitmix64, and a Feistel network over any range.

Nothing is stored, and no generator is drawn from: each number follows from its key alone.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

STRIDE = 0x9E3779B97F4A7C15
"""An odd number near 2**64 / the golden ratio: its multiples, modulo 2**64, visit every number once."""
MASK = (1 << 64) - 1


def seed_for(*keys: int) -> int:
    """Hash integers into 64 bits (splitmix64), for generators and orders that depend on nothing else."""
    word = 0
    for key in keys:
        word = (word ^ key) + STRIDE & MASK
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
        word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
        word ^= word >> 31
    return word


def seeds_for(key: int, numbers: NDArray[np.int64]) -> Words:
    """Return ``seed_for(key, number)`` for each of ``numbers``."""
    words = (np.uint64(seed_for(key)) ^ as_words(numbers)) + np.uint64(STRIDE)
    return mix(words)


def permute(places: Words, n: int, key: Words) -> Words:
    """Return where each of ``places``, below ``n``, goes in the permutation of 0..n-1 that ``key`` stands for."""
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
    words = mix(words)
    words >>= np.uint64(32)
    words *= bound
    words >>= np.uint64(32)
    return words


def mix(words: Words) -> Words:
    """Apply splitmix64's finalizer in place: every bit of the input changes half the bits of the output."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def as_words(numbers: NDArray[np.int64]) -> Words:
    """Return ``numbers`` as the 64 bits that are hashed."""
    return numbers.astype(np.uint64)

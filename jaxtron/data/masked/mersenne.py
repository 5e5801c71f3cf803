"""The numbers of C++'s `std::mt19937` and `std::mt19937_64`, which Megatron's helpers draw from.

Matsumoto and Nishimura 1998; the 64-bit generator is Nishimura's mt19937-64 of 2004 with the parameters that the C++
standard ([rand.predef]) lists.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt64

_STATE = 312
_MIDDLE = 156
_MATRIX = np.uint64(0xB5026F5AA96619E9)
_UPPER = np.uint64(0xFFFFFFFF80000000)
_LOWER = np.uint64(0x000000007FFFFFFF)


def mt19937(seed: int, *, block: int = 4096) -> Iterator[int]:
    """The endless stream of `std::mt19937(seed)`, 32 bits each, drawn `block` at a time."""
    # NumPy seeds its legacy generator with one integer exactly as C++ does
    generator = np.random.RandomState(seed)
    while True:
        yield from generator.randint(0, 2**32, size=block, dtype=np.uint32).tolist()


def mt19937_64(seed: int, count: int) -> UInt64[np.ndarray, "N"]:
    """The first `count` numbers of `std::mt19937_64(seed)`."""
    words = [seed % 2**64]
    for i in range(1, _STATE):
        words.append((6364136223846793005 * (words[-1] ^ (words[-1] >> 62)) + i) % 2**64)
    state = np.array(words, np.uint64)
    blocks = [np.empty(0, np.uint64)]
    for _ in range(-(-count // _STATE)):
        # each new word needs the old one after it and the word half a state on: that one is old for the first half,
        # already new for the second, and the last needs a first that is new
        for begin, end in ((0, _MIDDLE), (_MIDDLE, _STATE - 1), (_STATE - 1, _STATE)):
            following = state[np.arange(begin + 1, end + 1) % _STATE]
            halfway = state[np.arange(begin + _MIDDLE, end + _MIDDLE) % _STATE]
            mixed = (state[begin:end] & _UPPER) | (following & _LOWER)
            state[begin:end] = halfway ^ (mixed >> np.uint64(1)) ^ ((mixed & np.uint64(1)) * _MATRIX)
        blocks.append(_temper(state))
    return np.concatenate(blocks)[:count]


def _temper(words: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    words = words ^ ((words >> np.uint64(29)) & np.uint64(0x5555555555555555))
    words = words ^ ((words << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000))
    words = words ^ ((words << np.uint64(37)) & np.uint64(0xFFF7EEE000000000))
    return words ^ (words >> np.uint64(43))

"""Loops over documents and places that Numba compiles where it is installed (`jaxtron[fast]`).

What they write is to the byte what NumPy's ways beside them write. They only write to their last arguments, and begin
with no state, so that one may be run twice.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

# importing Numba and loading a loop take half a second in every process: below this, NumPy has finished by then
LEAST_PLACES = 1 << 22
LEAST_DOCUMENTS = 1 << 25
# documents whose ends are summed before samples are looked for; both arrays stay in a core's first cache
BLOCK = 1024
# documents whose tokens are added up at once, to see whether a sample ends among them
GROUP = 4


def run(loop: Callable[..., None], *arguments: Any) -> bool:
    """Runs a loop compiled; False, with nothing done, where it cannot be.

    Machine code is kept beside this file, else in the user's cache folder. Where neither can be written, or the disk
    is full, it is compiled for this process alone.
    """
    if numba() is None:
        return False
    try:
        _compile(loop, keep=True)(*arguments)
    except (RuntimeError, OSError):
        _compile(loop, keep=False)(*arguments)
    return True


@functools.cache
def numba() -> ModuleType | None:
    """Numba, or None: not installed, not for this NumPy, told not to compile, or numbers lie the other way round."""
    try:
        library = importlib.import_module("numba")
    except ImportError:
        return None
    return None if library.config.DISABLE_JIT or sys.byteorder != "little" else library


@functools.cache
def _compile(loop: Callable[..., None], *, keep: bool) -> Callable[..., None]:
    library = numba()
    assert library is not None
    # tests wrap functions in checks of their annotations
    return library.njit(cache=keep)(inspect.unwrap(loop))


def blend_few(shares: Any, sizes: Any, datasets: Any, samples: Any) -> None:
    """Which of a few datasets comes at each place, and its sample there; `sizes` (float64) may be infinite."""
    counts = np.zeros(len(shares))
    for place in range(len(datasets)):
        time = max(np.float64(place), 1.0)
        best, most = 0, -np.inf
        for dataset in range(len(shares)):
            lag = shares[dataset] * time - counts[dataset]
            if lag > most and counts[dataset] < sizes[dataset]:
                best, most = dataset, lag
        datasets[place], samples[place] = best, np.int64(counts[best])
        counts[best] += 1.0


def blend_many(shares: Any, sizes: Any, datasets: Any, samples: Any) -> None:
    """`blend_few` by fours: of many datasets, which one lags most so far is a branch that processors guess badly."""
    fours = (len(shares) + 3) // 4 * 4
    # those of size 0 that fill up never lag
    weights, counts, taken = np.zeros(fours), np.full(fours, np.inf), np.zeros(fours, np.int64)
    weights[: len(shares)] = shares
    counts[: len(shares)] = np.where(sizes > 0, 0.0, np.inf)
    for place in range(len(datasets)):
        time = max(np.float64(place), 1.0)
        best, most = 0, -np.inf
        for first in range(0, fours, 4):
            a = weights[first] * time - counts[first]
            b = weights[first + 1] * time - counts[first + 1]
            c = weights[first + 2] * time - counts[first + 2]
            d = weights[first + 3] * time - counts[first + 3]
            a = a if a > b else b
            c = c if c > d else d
            a = a if a > c else c
            if a > most:
                best, most = first, a
        while weights[best] * time - counts[best] != most:
            best += 1
        datasets[place], samples[place] = best, taken[best]
        taken[best] += 1
        counts[best] += 1.0
        if counts[best] == sizes[best]:
            # what is used up lags infinitely little
            counts[best] = np.inf


def cut_documents(packed: Any, length: int, extra: int, rows: Any) -> None:
    """Rows of a sample index, position in the lower and offset in the upper half, where documents are short."""
    last, row, need, first = len(rows) - 1, 1, length + extra, 0
    rows[0] = 0
    while first + GROUP <= len(packed):
        tokens = np.int64(0)
        for index in range(GROUP):
            tokens += packed[first + index] >> 32
        if tokens < need:
            need -= tokens
        else:
            for index in range(GROUP):
                tokens = packed[first + index] >> 32
                while tokens >= need and row <= last:
                    rows[row] = (need - extra) << 32 | (first + index)
                    row += 1
                    need += length
                need -= tokens
        first += GROUP
    for position in range(first, len(packed)):
        tokens = packed[position] >> 32
        while tokens >= need and row <= last:
            rows[row] = (need - extra) << 32 | position
            row += 1
            need += length
        need -= tokens
    for left in range(row, last + 1):
        rows[left] = ((packed[-1] >> 32) - extra) << 32 | (len(packed) - 1)


def _cut_long(width: int) -> Callable[..., None]:
    """`cut_documents` where a sample ends in most documents.

    How many do is a branch that processors guess badly: so `width` rows are written in any case, and the next
    document writes over those that were none. Quotients are exact below 2^53 tokens.
    """

    def cut(packed: Any, length: int, extra: int, rows: Any) -> None:
        last, base, done, first = len(rows) - 1, 0, 0, 0
        ends, closed = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
        while first + BLOCK <= len(packed):
            end = base
            for index in range(BLOCK):
                end += packed[first + index] >> 32
                ends[index] = end
            for index in range(BLOCK):
                closed[index] = np.int64(np.float64(ends[index] - extra) / np.float64(length))
            if closed[BLOCK - 1] + width > last:
                break
            for index in range(BLOCK):
                row = ((done + 1) * length - base) << 32 | (first + index)
                for further in range(width):
                    rows[np.uintp(done + 1 + further)] = row + ((further * length) << 32)
                for further in range(width, closed[index] - done):
                    rows[np.uintp(done + 1 + further)] = row + ((further * length) << 32)
                base, done = ends[index], closed[index]
            first += BLOCK
        for position in range(first, len(packed)):
            end = base + (packed[position] >> 32)
            while (done + 1) * length <= end - extra and done < last:
                rows[done + 1] = ((done + 1) * length - base) << 32 | position
                done += 1
            base = end
        for left in range(done + 1, last + 1):
            rows[left] = ((packed[-1] >> 32) - extra) << 32 | (len(packed) - 1)
        # last, for empty documents ahead of samples of one token end before the first
        rows[0] = 0

    return cut


cut_long, cut_longer = _cut_long(1), _cut_long(4)

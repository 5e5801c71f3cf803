"""Words and n-grams as 64-bit hashes, many documents at a time, and the 128-bit hash of a text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from jaxtron.config import UserError

try:
    import xxhash
except ImportError:
    xxhash = None

WORD = re.compile(r"\w+")
MOST_REMEMBERED = 1 << 20
# odd constants of splitmix64
_GOLDEN, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Units:
    """Hashed words (or characters) of several documents, one document after another.

    Document d has `hashes[bounds[d] : bounds[d + 1]]`; `lengths` are the units' characters.
    """

    hashes: UInt64[np.ndarray, "W"]
    lengths: Int64[np.ndarray, "W"]
    bounds: Int64[np.ndarray, "Bounds"]

    def of(self, documents: Int64[np.ndarray, "N"]) -> "Units":
        """Those of some documents, given in rising order."""
        sizes = np.diff(self.bounds)
        wanted = np.zeros(len(sizes), bool)
        wanted[documents] = True
        units = np.repeat(wanted, sizes)
        return Units(self.hashes[units], self.lengths[units], _bounds(sizes[documents]))


class _WordHashes(dict[str, int]):
    """Hashes of words in lower case, remembered: most words of a text are few words."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_REMEMBERED:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.lower().encode("utf-8", "surrogatepass"))  # pyright: ignore
        return value


_word_hashes = _WordHashes()


def require() -> None:
    """UserError where xxhash is not installed."""
    if xxhash is None:
        raise UserError('curation needs xxhash; pip install "jaxtron[curate]"')


def words(texts: Sequence[str]) -> Units:
    """Every run of letters, digits and underscores, in lower case."""
    found = [WORD.findall(text) for text in texts]
    bounds = _bounds([len(one) for one in found])
    flat = [word for one in found for word in one]
    hashes = np.fromiter(map(_word_hashes.__getitem__, flat), np.uint64, len(flat))
    return Units(hashes, np.fromiter(map(len, flat), np.int64, len(flat)), bounds)


def characters(texts: Sequence[str]) -> Units:
    """Every code point of the texts in lower case, runs of white space as one space."""
    plain = [normalized(text) for text in texts]
    points = np.frombuffer("".join(plain).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    return Units(mixed(points), np.ones(len(points), np.int64), _bounds([len(one) for one in plain]))


def normalized(text: str) -> str:
    """Lower case, runs of white space as one space, none at the ends."""
    return " ".join(text.lower().split())


def text_hash(text: str) -> tuple[int, int]:
    """High and low half of the text's 128-bit hash."""
    digest = xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass"))  # pyright: ignore
    return digest >> 64, digest & (2**64 - 1)


def mixed(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """splitmix64's finalizer: a bijection after which every bit depends on all."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def combined(columns: Sequence[UInt64[np.ndarray, "N"]]) -> UInt64[np.ndarray, "N"]:
    """One hash of each row, in which the order of its columns counts."""
    total = np.full(len(columns[0]), _GOLDEN)
    for column in columns:
        total = _chained(total, column)
    return mixed(total)


def ngrams(units: Units, size: int) -> tuple[UInt64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """The hash of every `size` units in a row within a document, and the place of the first of them in `units`."""
    return ngrams_of_sizes(units, [size])[size]


def ngrams_of_sizes(
    units: Units, sizes: Sequence[int]
) -> dict[int, tuple[UInt64[np.ndarray, "N"], Int64[np.ndarray, "N"]]]:
    """The n-grams of several sizes, each made from those of one unit less."""
    found = {}
    total, fits = np.full(len(units.hashes), _GOLDEN), np.ones(len(units.hashes), bool)
    for size in range(1, max(sizes) + 1):
        length = max(len(units.hashes) - size + 1, 0)
        total, fits = _chained(total[:length], units.hashes[size - 1 :]), fits[:length]
        # those that begin so many units before the end of a document do not fit in it
        late = units.bounds[1:] - size + 1
        fits[late[(late >= 0) & (late < length) & (size > 1)]] = False
        if size in sizes:
            starts = np.flatnonzero(fits)
            found[size] = mixed(total[starts]), starts
    return found


def _chained(total: UInt64[np.ndarray, "N"], column: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    total = (total ^ column) * _FIRST
    total ^= total >> np.uint64(29)
    return total


def shingles(units: Units, size: int) -> tuple[UInt64[np.ndarray, "N"], Int64[np.ndarray, "Bounds"]]:
    """Every document's n-grams and where they begin; a document of fewer units has one of all it has, if any."""
    hashes, starts = ngrams(units, size)
    counts = np.diff(np.searchsorted(starts, units.bounds))
    sizes = np.diff(units.bounds)
    short = np.flatnonzero((sizes > 0) & (sizes < size))
    if len(short):
        places = np.searchsorted(starts, units.bounds[short])
        whole = [combined([units.hashes[i : i + 1] for i in range(*units.bounds[d : d + 2])])[0] for d in short]
        hashes = np.insert(hashes, places, np.array(whole, np.uint64))
        counts[short] = 1
    return hashes, _bounds(counts)


def _bounds(sizes: Sequence[int] | Int64[np.ndarray, "D"]) -> Int64[np.ndarray, "Bounds"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

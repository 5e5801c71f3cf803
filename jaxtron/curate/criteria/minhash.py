"""MinHash signatures, and bands of them that similar documents share (Broder 1997; Leskovec et al., ch. 3)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, UInt32, UInt64

from jaxtron.curate.criteria.hashing import combined

INTEGRATION_POINTS = 1001


@dataclass(frozen=True)
class Bands:
    """Two documents are candidates if all minima of at least one band are equal."""

    bands: int
    rows: int

    def probability(self, jaccard: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
        """How likely documents of this Jaccard index are to be candidates: 1 - (1 - s^rows)^bands."""
        return np.asarray(1 - (1 - np.asarray(jaccard, np.float64) ** self.rows) ** self.bands)


def best_bands(jaccard: float, hashes: int, miss_weight: float) -> Bands:
    """The bands of at most so many hashes with the least weighted area of misses above and candidates below `jaccard`.

    For a Jaccard index spread evenly over 0 to 1, the areas are the probabilities of the two mistakes.
    """
    points = np.linspace(0, 1, INTEGRATION_POINTS)
    above = points >= jaccard

    def cost(choice: Bands) -> float:
        found = choice.probability(points)
        return miss_weight * float((1 - found[above]).sum()) + (1 - miss_weight) * float(found[~above].sum())

    choices = [Bands(bands, rows) for rows in range(1, hashes + 1) for bands in _numbers_of_bands(hashes // rows)]
    return min(choices, key=cost)


def signatures(
    shingles: UInt64[np.ndarray, "N"], bounds: Int64[np.ndarray, "Bounds"], hashes: int, seed: int
) -> UInt32[np.ndarray, "D H"]:
    """For every document and hash function the least hash of its shingles; documents without any are all ones.

    Hash function k is the high half of a_k x + b_k modulo 2^64, for odd a_k; the shingles are hashes already.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    factors = random.integers(0, 2**63, hashes, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 2**64, hashes, dtype=np.uint64)
    found = np.full((len(bounds) - 1, hashes), np.iinfo(np.uint32).max, np.uint32)
    full = np.flatnonzero(np.diff(bounds))
    if len(full):
        starts, room = bounds[full], np.empty_like(shingles)
        for k in range(hashes):
            np.multiply(shingles, factors[k], out=room)
            np.add(room, offsets[k], out=room)
            found[full, k] = np.minimum.reduceat(room, starts) >> np.uint64(32)
    return found


def band_keys(signatures: UInt32[np.ndarray, "D H"], bands: Bands) -> UInt64[np.ndarray, "D Bands"]:
    """A hash of each band of each signature; equal keys in a band make candidates."""
    wide = signatures[:, : bands.bands * bands.rows].astype(np.uint64)
    return np.stack([combined(list(wide[:, first : first + bands.rows].T)) for first in _firsts(bands)], axis=1)


def estimated_jaccard(left: UInt32[np.ndarray, "N H"], right: UInt32[np.ndarray, "N H"]) -> Float64[np.ndarray, "N"]:
    """The share of equal minima: unbiased, with variance s (1 - s) / H."""
    return (left == right).mean(axis=1)


def _firsts(bands: Bands) -> range:
    return range(0, bands.bands * bands.rows, bands.rows)


def _numbers_of_bands(most: int) -> range:
    # more bands of the same rows find more; below half of what there is room for is never best
    return range(max(1, most // 4), most + 1)

"""Several datasets as one: which dataset, and which of its samples, comes at each place.

At each place the dataset that lags its share most comes next, the first of those that lag alike. Equal to Megatron's,
bit for bit: the lag is `weight * max(place, 1) - count` in float64.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int16, Int64

from jaxtron.config import UserError
from jaxtron.data.megatron import compiled

# share of samples that a dataset holds beyond what the weights ask of it
SURPLUS = 0.005
MOST_DATASETS = 32767
# places that one chain walks through
CHAIN = 1024
# steps of a chain between looks at which ones have met
LOOK = 8
# datasets from which on a compiled loop takes them by fours
MANY = 16
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Blend:
    """Place i of the blend is sample `samples[i]` of dataset `datasets[i]`."""

    datasets: Int16[np.ndarray, "N"]
    samples: Int64[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.datasets)


def parse_blend(items: Sequence[str | float]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a list `weight prefix weight prefix ...`, or of prefixes alone (then weights are None).

    An odd number of items is prefixes alone, and so is an even one whose every second item is no number.
    """
    words = [str(item).strip() for item in items]
    if not words or not all(words):
        raise UserError(f"the data paths {list(items)} are empty; give prefixes, or weights and prefixes in turn")
    numbers = [number_of(word) for word in words[::2]]
    weights = [number for number in numbers if number is not None]
    if len(words) % 2 or not weights:
        return words, None
    if len(weights) < len(numbers):
        wrong = words[2 * numbers.index(None)]
        raise UserError(f"{wrong!r} is not a weight, but others of the data paths are; give each prefix one, or none")
    return words[1::2], weights


def normalize(weights: Sequence[float] | Float64[np.ndarray, "K"]) -> Float64[np.ndarray, "K"]:
    """The weights as shares of 1; UserError unless each is above 0."""
    given = np.array(weights, np.float64)
    if not 1 <= len(given) <= MOST_DATASETS or not (np.isfinite(given).all() and (given > 0).all()):
        raise UserError(f"the weights {list(weights)[:10]} are not 1 to {MOST_DATASETS} numbers above 0; leave 0 out")
    return given / given.sum()


def component_samples(weights: Sequence[float], samples: int, *, surplus: float = SURPLUS) -> list[int]:
    """How many samples each dataset must have for a blend of `samples`."""
    return [math.ceil(math.ceil(samples * weight) * (1 + surplus)) for weight in normalize(weights).tolist()]


def build_blend(weights: Sequence[float], samples: int) -> Blend:
    """The first `samples` places of an endless blend by weight."""
    shares = normalize(weights)
    return _blend(shares, samples, None)


def build_exhaustive_blend(sizes: Sequence[int]) -> Blend:
    """Every sample of every dataset once, spread evenly."""
    counts = np.array(sizes, np.int64)
    if not 1 <= len(counts) <= MOST_DATASETS or (counts < 0).any() or not counts.any():
        raise UserError(f"the datasets have {list(sizes)[:10]} samples; give 1 to {MOST_DATASETS} that have some")
    total = int(counts.sum())
    return _blend(counts / float(total), total, counts)


def number_of(word: str) -> float | None:
    # not all that `float` takes: `inf` and `1_000` are names
    return float(word) if NUMBER.fullmatch(word) else None


def _blend(shares: Float64[np.ndarray, "K"], length: int, sizes: Int64[np.ndarray, "K"] | None) -> Blend:
    """The places, by a compiled loop where there are many and Numba is installed."""
    if len(shares) == 1:
        return Blend(datasets=np.zeros(length, np.int16), samples=np.arange(length))
    if length >= compiled.LEAST_PLACES:
        built = Blend(datasets=np.empty(length, np.int16), samples=np.empty(length, np.int64))
        loop = compiled.blend_few if len(shares) < MANY else compiled.blend_many
        most = np.full(len(shares), np.inf) if sizes is None else sizes.astype(np.float64)
        if compiled.run(loop, shares, most, built.datasets, built.samples):
            return built
    return _numbered(_greedy(shares, length, sizes), len(shares))


def _numbered(datasets: Int16[np.ndarray, "N"], num_datasets: int) -> Blend:
    """Each dataset's places get its samples in turn."""
    order = np.argsort(datasets, kind="stable")
    counts = np.bincount(datasets, minlength=num_datasets)
    samples = np.empty(len(datasets), np.int64)
    samples[order] = np.arange(len(datasets)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Blend(datasets=datasets, samples=samples)


def _greedy(
    shares: Float64[np.ndarray, "K"], length: int, sizes: Int64[np.ndarray, "K"] | None
) -> Int16[np.ndarray, "N"]:
    """The dataset of each place.

    What is chosen depends on all choices before, so the row is cut into chains that walk side by side, each from a
    guess of the counts at its start. Chains at one place with different counts draw nearer at every step, so soon
    they meet, and guesses hardly matter; where a chain began otherwise than the one before ended, it walks again from
    there until it meets its old path. The result is exact: it stands when every chain begins where the last one ended.
    """
    steps = min(CHAIN, max(64, math.isqrt(length)))
    starts = steps * np.arange(-(-length // steps))
    begins = _guess(shares, starts)
    ends = np.empty_like(begins)
    picks = np.empty((steps, len(starts)), np.int16)
    drift, again = None, np.arange(len(starts))
    while len(again):
        chains = _Chains(shares, sizes, starts[again], begins.take(again, axis=1))
        _walk(chains, picks, ends, again, drift)
        right = np.concatenate([begins[:, :1], ends[:, :-1]], axis=1)
        again = np.flatnonzero((right != begins).any(axis=0))
        drift, begins = (right - begins).take(again, axis=1), right
    return np.ascontiguousarray(picks.T).reshape(-1)[:length]


class _Chains:
    """Chains at one step: their places, and the counts there, which are the caller's to give away."""

    def __init__(
        self,
        shares: Float64[np.ndarray, "K"],
        sizes: Int64[np.ndarray, "K"] | None,
        places: Int64[np.ndarray, "C"],
        counts: Float64[np.ndarray, "K C"],
    ):
        self.shares = shares.tolist()
        self.sizes = None if sizes is None else sizes.tolist()
        self.places = places.astype(np.float64)
        self.counts = counts

    def step(self) -> Int16[np.ndarray, "C"]:
        """The dataset that comes next in each chain."""
        time = np.maximum(self.places, 1)
        picks, most = np.zeros(len(time), np.int16), np.full(len(time), -np.inf)
        for number, (share, counts) in enumerate(zip(self.shares, self.counts, strict=True)):
            lag = share * time
            lag -= counts
            if self.sizes is not None:
                lag[counts >= self.sizes[number]] = -np.inf
            np.copyto(picks, number, where=lag > most)
            np.maximum(most, lag, out=most)
        _add_at(self.counts, picks, 1)
        self.places += 1
        return picks

    def keep(self, which: Bool[np.ndarray, "C"]) -> None:
        """Leaves out the chains that `which` does not name."""
        self.places, self.counts = self.places[which], np.compress(which, self.counts, axis=1)


def _walk(
    chains: _Chains,
    picks: Int16[np.ndarray, "L C"],
    ends: Float64[np.ndarray, "K C"],
    columns: Int64[np.ndarray, "A"],
    drift: Float64[np.ndarray, "K A"] | None,
) -> None:
    """Writes what the chains of some columns pick and where they end.

    `drift` is how far the counts are from those of the path in `picks` already; a chain stops where it becomes 0.
    """
    for step in range(len(picks)):
        picked = chains.step()
        if drift is not None:
            _add_at(drift, picked, 1)
            _add_at(drift, picks[step, columns], -1)
        picks[step, columns] = picked
        if drift is not None and step % LOOK == LOOK - 1:
            apart = drift.any(axis=0)
            if not apart.all():
                columns, drift = columns[apart], np.compress(apart, drift, axis=1)
                chains.keep(apart)
            if not len(columns):
                return
    ends[:, columns] = chains.counts


def _add_at(counts: Float64[np.ndarray, "K C"], rows: Int16[np.ndarray, "C"], amount: int) -> None:
    """Adds to one row of each column."""
    assert counts.flags.c_contiguous
    # one flat index is several times faster than two
    counts.reshape(-1)[rows * np.int64(counts.shape[1]) + np.arange(counts.shape[1])] += amount


def _guess(shares: Float64[np.ndarray, "K"], places: Int64[np.ndarray, "C"]) -> Float64[np.ndarray, "K C"]:
    """Counts near the shares that add up to the place: rounded down, and the largest remainders up."""
    exact = shares[:, None] * places
    counts = np.floor(exact)
    missing = places - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - exact, axis=0, kind="stable"), axis=0)
    counts[rank < missing] += 1
    return counts

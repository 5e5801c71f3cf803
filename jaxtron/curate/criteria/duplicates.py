"""Which documents are equal, which are alike, and which one of each group stays; documents are numbers here."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# of documents with one key: up to so many, every pair is compared; above, each with the leaders found so far
MOST_PAIRED = 64
PAIRS_AT_ONCE = 1 << 18

Numbers = Int64[np.ndarray, "N"]
Chosen = Int64[np.ndarray, "C"]
"""Of N documents, some."""
Similarity = Callable[[Numbers, Numbers], Float64[np.ndarray, "N"]]
"""The Jaccard index of each pair of documents."""


def equal_documents(columns: Sequence[UInt64[np.ndarray, "N"]], numbers: Numbers) -> tuple[Chosen, Chosen]:
    """Documents whose columns equal those of an earlier one, and the first such document of each."""
    if not len(numbers):
        return numbers, numbers
    order, starts = _groups(columns, numbers)
    sizes = np.diff(np.append(starts, len(order)))
    later = np.ones(len(order), bool)
    later[starts] = False
    return numbers[order][later], np.repeat(numbers[order[starts]], sizes)[later]


def shared_keys(keys: UInt64[np.ndarray, "N"], numbers: Numbers) -> tuple[Chosen, Int64[np.ndarray, "Bounds"]]:
    """The documents whose key another one has too, in order within a key, and where each key's documents begin.

    Key 0 is shared with nobody: it stands for a document without shingles.
    """
    numbers, keys = numbers[keys != 0], keys[keys != 0]
    if not len(numbers):
        return numbers, np.zeros(1, np.int64)
    order, starts = _groups([keys], numbers)
    sizes = np.diff(np.append(starts, len(order)))
    kept = np.repeat(sizes > 1, sizes)
    return numbers[order][kept], np.append(0, np.cumsum(sizes[sizes > 1]))


def similar_pairs(
    members: Numbers, bounds: Int64[np.ndarray, "Bounds"], similarity: Similarity, threshold: float
) -> Int64[np.ndarray, "E 2"]:
    """Pairs of one key whose similarity reaches the threshold, as many as connect what is alike.

    In keys of more than MOST_PAIRED documents each is linked to the first alike leader, and is one itself if there is
    none: time stays linear for thousands of copies, and two clusters there are joined only by another band.
    """
    found = [np.empty((0, 2), np.int64)]
    for left, right in _candidates(members, bounds):
        alike = similarity(left, right) >= threshold
        found.append(np.stack([left[alike], right[alike]], axis=1))
    for group in np.flatnonzero(np.diff(bounds) > MOST_PAIRED):
        rest = members[bounds[group] : bounds[group + 1]]
        while len(rest) > 1:
            leader, rest = rest[0], rest[1:]
            alike = _in_slices(similarity, np.full(len(rest), leader), rest) >= threshold
            found.append(np.stack([np.full(int(alike.sum()), leader), rest[alike]], axis=1))
            rest = rest[~alike]
    return np.concatenate(found)


def _candidates(members: Numbers, bounds: Int64[np.ndarray, "Bounds"]) -> Iterator[tuple[Numbers, Numbers]]:
    """Every pair within a key of few documents, many at a time."""
    sizes = np.diff(bounds)
    for size in np.unique(sizes[sizes <= MOST_PAIRED]).tolist():
        starts = bounds[:-1][sizes == size]
        first, second = np.triu_indices(size, 1)
        step = max(1, PAIRS_AT_ONCE // max(len(first), 1))
        for start in range(0, len(starts), step):
            table = members[starts[start : start + step, None] + np.arange(size)]
            yield table[:, first].ravel(), table[:, second].ravel()


def _in_slices(similarity: Similarity, left: Numbers, right: Numbers) -> Float64[np.ndarray, "N"]:
    starts = range(0, len(left), PAIRS_AT_ONCE)
    parts = [similarity(left[s : s + PAIRS_AT_ONCE], right[s : s + PAIRS_AT_ONCE]) for s in starts]
    return np.concatenate(parts) if parts else np.empty(0)


def dropped_of_components(
    pairs: Int64[np.ndarray, "E 2"], lengths: Callable[[Numbers], Int64[np.ndarray, "N"]] | None = None
) -> tuple[Numbers, Numbers]:
    """All documents but one of each connected component, in order, and the one that stays for each.

    The first stays, or the longest (of equally long ones the first) where their lengths are given.
    """
    numbers, places = np.unique(pairs, return_inverse=True)
    if not len(numbers):
        return numbers, numbers
    left, right = places.reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(numbers), len(numbers)))
    _, labels = connected_components(graph, directed=False)
    worth = np.zeros(len(numbers), np.int64) if lengths is None else lengths(numbers)
    order = np.lexsort((numbers, -worth, labels))
    _, firsts = np.unique(labels[order], return_index=True)
    keepers = numbers[order[firsts]][labels]
    return numbers[numbers != keepers], keepers[numbers != keepers]


def exact_jaccard(left: UInt64[np.ndarray, "A"], right: UInt64[np.ndarray, "B"]) -> float:
    """The Jaccard index of two sets, given as arrays without repetition."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(len(left) + len(right) - shared, 1)


def among(numbers: Numbers, sorted_numbers: Chosen) -> Bool[np.ndarray, "N"]:
    """Which numbers are in a sorted array."""
    if not len(sorted_numbers):
        return np.zeros(len(numbers), bool)
    places = np.minimum(np.searchsorted(sorted_numbers, numbers), len(sorted_numbers) - 1)
    return sorted_numbers[places] == numbers


def _groups(
    columns: Sequence[UInt64[np.ndarray, "N"]], numbers: Numbers
) -> tuple[Numbers, Int64[np.ndarray, "Groups"]]:
    """The order by columns, then number, and where rows of equal columns begin in it."""
    order = np.lexsort((numbers, *columns))
    new = np.zeros(len(order), bool)
    new[0] = True
    for column in columns:
        new[1:] |= np.diff(column[order]) != 0
    return order, np.flatnonzero(new)

"""Groups of equal documents, pairs within a key, and components, against plain loops."""

import itertools

import numpy as np
import pytest

from jaxtron.curate.criteria import duplicates
from jaxtron.curate.criteria.duplicates import (
    dropped_of_components,
    equal_documents,
    exact_jaccard,
    shared_keys,
    similar_pairs,
)


def integers(values):
    return np.array(values, np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_of_equal_documents_stays(seed):
    random = np.random.default_rng(seed)
    columns = [random.integers(0, 4, 50).astype(np.uint64) for _ in range(2)]
    numbers = integers(random.permutation(100)[:50])
    dropped, keepers = equal_documents(columns, numbers)
    rows = {int(n): (int(a), int(b)) for n, a, b in zip(numbers, *columns, strict=True)}
    first = {row: min(n for n in rows if rows[n] == row) for row in rows.values()}
    expected = {n: first[row] for n, row in rows.items() if first[row] != n}
    assert dict(zip(dropped.tolist(), keepers.tolist(), strict=True)) == expected
    assert len(dropped) == len(expected)


def test_no_documents_have_no_equals():
    dropped, _ = equal_documents([np.empty(0, np.uint64)], integers([]))
    members, bounds = shared_keys(np.empty(0, np.uint64), integers([]))
    assert len(dropped) == len(members) == 0 and bounds.tolist() == [0]


def test_keys_that_are_shared():
    keys = np.array([7, 0, 5, 7, 0, 9, 5, 7], np.uint64)
    members, bounds = shared_keys(keys, np.arange(8))
    groups = [members[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    # key 0 is of documents without shingles, which are like no other
    assert sorted(groups) == [[0, 3, 7], [2, 6]]


def similarity_of(alike):
    def similarity(left, right):
        pairs = zip(left.tolist(), right.tolist(), strict=True)
        return np.array([float((a, b) in alike or (b, a) in alike) for a, b in pairs])

    return similarity


def test_every_pair_of_a_small_key_is_compared():
    members, bounds = integers([4, 6, 9, 1, 2, 3, 8]), integers([0, 3, 5, 7])
    alike = {(4, 9), (6, 9), (1, 2), (3, 4)}
    pairs = similar_pairs(members, bounds, similarity_of(alike), 0.5)
    assert {tuple(pair) for pair in pairs.tolist()} == {(4, 9), (6, 9), (1, 2)}


def test_a_large_key_links_each_document_to_a_leader(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRED", 8)
    calls = []

    def same_remainder(left, right):
        calls.append(len(left))
        return (left % 3 == right % 3).astype(float)

    members = np.arange(300)
    pairs = similar_pairs(members, integers([0, 300]), same_remainder, 0.5)
    dropped, keepers = dropped_of_components(pairs)
    assert len(dropped) == 297 and (keepers == dropped % 3).all()
    # three leaders meet everyone once: no squares
    assert sum(calls) < 3 * 300


def test_many_small_keys_are_compared_in_bounded_steps(monkeypatch):
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 10)
    sizes = []

    def all_alike(left, right):
        sizes.append(len(left))
        return np.ones(len(left))

    pairs = similar_pairs(np.arange(60), np.arange(0, 61, 3), all_alike, 0.5)
    assert len(pairs) == 20 * 3 and max(sizes) <= 10


def test_a_chain_is_one_component():
    chain = np.stack([np.arange(9), np.arange(1, 10)], axis=1)
    pairs = np.concatenate([chain[::2], chain[1::2], integers([[20, 21]])])
    dropped, keepers = dropped_of_components(pairs)
    assert dropped.tolist() == [*range(1, 10), 21]
    assert keepers.tolist() == [0] * 9 + [20]


def test_the_longest_of_a_component_stays_and_of_equally_long_ones_the_first():
    lengths = integers([5, 9, 9, 1])
    dropped, keepers = dropped_of_components(integers([[0, 1], [1, 2], [2, 3]]), lambda numbers: lengths[numbers])
    assert dropped.tolist() == [0, 2, 3] and keepers.tolist() == [1, 1, 1]


def test_no_pairs_drop_nothing():
    dropped, _ = dropped_of_components(np.empty((0, 2), np.int64))
    assert len(dropped) == 0


def test_jaccard_of_sets():
    left, right = np.arange(10, dtype=np.uint64), np.arange(4, 12, dtype=np.uint64)
    assert exact_jaccard(left, right) == 6 / 12
    assert exact_jaccard(left[:0], right[:0]) == 0

"""Hashes of words and shingles, signatures that estimate the Jaccard index, and the bands' probability."""

import numpy as np
import pytest

from jaxtron.curate.criteria.hashing import Units, characters, ngrams, shingles, text_hash, words
from jaxtron.curate.criteria.minhash import Bands, band_keys, best_bands, estimated_jaccard, signatures

TEXTS = ["a b c d e", "", "a b c", "B C d e f", "x"]


def shingles_of(texts, size):
    hashes, bounds = shingles(words(texts), size)
    return [hashes[start:end].tolist() for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def test_words_are_compared_without_case():
    units = words(["Hello, World_1!", "hello world_1"])
    assert units.bounds.tolist() == [0, 2, 4]
    assert units.hashes[:2].tolist() == units.hashes[2:].tolist()
    assert units.lengths.tolist() == [5, 7, 5, 7]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_ngrams_stay_within_a_document(size):
    units = words(TEXTS)
    plain = [text.lower().split() for text in TEXTS]
    expected = [tuple(doc[i : i + size]) for doc in plain for i in range(len(doc) - size + 1)]
    hashes, starts = ngrams(units, size)
    assert len(hashes) == len(expected)
    # equal words are equal hashes, and other words others
    for i, one in enumerate(expected):
        for j, other in enumerate(expected):
            assert (hashes[i] == hashes[j]) == (one == other)
    flat = [word for doc in plain for word in doc]
    assert [tuple(flat[start : start + size]) for start in starts.tolist()] == expected


def test_the_order_of_words_counts():
    assert shingles_of(["a b"], 2) != shingles_of(["b a"], 2)
    assert shingles_of(["a a a b"], 2)[0][:2] == shingles_of(["a a a"], 2)[0]


def test_a_short_document_is_one_shingle_and_an_empty_one_none():
    found = shingles_of(TEXTS, 5)
    assert [len(one) for one in found] == [1, 0, 1, 1, 1]
    assert found[2] != found[4] and shingles_of(["a b c"], 4) == shingles_of(["a b c"], 9)


def test_batches_do_not_change_hashes():
    alone = [shingles_of([text], 2)[0] for text in TEXTS]
    assert shingles_of(TEXTS, 2) == alone


def test_characters_do_without_spaces_between_words():
    hashes, bounds = shingles(characters(["日本語の文", "語の文", "A  b"]), 3)
    assert np.diff(bounds).tolist() == [3, 1, 1]
    assert hashes[2] == hashes[3]
    assert characters(["A  b"]).hashes.tolist() == characters(["a b"]).hashes.tolist()


def test_half_of_a_surrogate_pair_is_hashed_too():
    assert text_hash("\ud800") != text_hash("")
    assert len(words(["\ud800x"]).hashes) == 1


def pair_of_sets(random, jaccard, size=400):
    """Two random sets of shingles of this Jaccard index."""
    shared = round(size * jaccard)
    values = random.integers(0, 2**64, size, dtype=np.uint64)
    half = (size - shared) // 2
    return values[: shared + half], np.concatenate([values[:shared], values[shared + half :]])


def signed_pairs(jaccard, pairs, hashes, seed=1):
    random = np.random.default_rng(seed)
    sets = [one for _ in range(pairs) for one in pair_of_sets(random, jaccard)]
    bounds = np.cumsum([0, *map(len, sets)])
    found = signatures(np.concatenate(sets), bounds, hashes, 0)
    return found[::2], found[1::2]


@pytest.mark.parametrize("jaccard", [0.1, 0.5, 0.8, 0.95])
def test_signatures_estimate_the_jaccard_index(jaccard):
    pairs, hashes = 400, 128
    estimates = estimated_jaccard(*signed_pairs(jaccard, pairs, hashes))
    deviation = np.sqrt(jaccard * (1 - jaccard) / hashes)
    # four standard errors of the mean, and of the deviation
    assert abs(estimates.mean() - jaccard) < 4 * deviation / np.sqrt(pairs)
    assert abs(estimates.std() / deviation - 1) < 4 / np.sqrt(2 * pairs)


def test_a_signature_is_the_least_of_each_hash_function():
    random = np.random.default_rng(0)
    values = random.integers(0, 2**64, 30, dtype=np.uint64)
    whole = signatures(values, np.array([0, 30]), 16, 3)[0]
    halves = signatures(values, np.array([0, 11, 11, 30]), 16, 3)
    assert (halves[[0, 2]].min(axis=0) == whole).all()
    assert (halves[1] == 2**32 - 1).all()
    assert not np.array_equal(signatures(values, np.array([0, 30]), 16, 4)[0], whole)


@pytest.mark.parametrize("jaccard", [0.6, 0.7, 0.8, 0.9])
def test_candidates_are_found_as_often_as_the_formula_says(jaccard):
    pairs, bands = 1500, Bands(bands=14, rows=9)
    keys = [band_keys(signed, bands) for signed in signed_pairs(jaccard, pairs, 128)]
    found = (keys[0] == keys[1]).any(axis=1).mean()
    expected = float(bands.probability(jaccard))
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs)


def test_bands_without_weights_are_those_of_datasketch():
    # datasketch.MinHashLSH(threshold=..., num_perm=128) chooses these
    assert best_bands(0.8, 128, 0.5) == Bands(9, 13)
    assert best_bands(0.5, 128, 0.5) == Bands(25, 5)


def test_bands_leave_no_better_choice():
    points = np.linspace(0, 1, 1001)

    def cost(choice, weight):
        found = choice.probability(points)
        return weight * (1 - found[points >= 0.7]).sum() + (1 - weight) * found[points < 0.7].sum()

    for weight in (0.1, 0.5, 0.9, 0.99):
        best = best_bands(0.7, 64, weight)
        assert best.bands * best.rows <= 64
        everything = [Bands(b, r) for r in range(1, 65) for b in range(1, 64 // r + 1)]
        assert cost(best, weight) <= min(cost(choice, weight) for choice in everything) + 1e-9


def test_units_of_some_documents():
    units = words(TEXTS)
    some = units.of(np.array([1, 2, 4]))
    again = words([TEXTS[1], TEXTS[2], TEXTS[4]])
    for name in Units.__annotations__:
        assert getattr(some, name).tolist() == getattr(again, name).tolist()

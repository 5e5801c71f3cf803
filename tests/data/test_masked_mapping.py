"""Megatron's sentence mapping: the C++ generators, its published rows, and a plain walk over the sentences."""

import hashlib
from itertools import islice

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.masked.mapping import build_mapping
from jaxtron.data.masked.mersenne import mt19937, mt19937_64

DOCUMENTS = np.array([0, 4, 6, 9])
LENGTHS = np.array([5, 6, 7, 4, 9, 3, 8, 2, 6], np.int32)


def test_the_ten_thousandth_numbers_are_those_of_the_cpp_standard():
    # [rand.predef] gives both for the default seed 5489
    assert next(islice(mt19937(5489), 9999, None)) == 4123659995
    assert mt19937_64(5489, 10_000)[-1] == 9981545732273789042


def test_blocks_of_the_generators_join_up():
    assert list(islice(mt19937(7, block=10), 35)) == list(islice(mt19937(7, block=1000), 35))
    assert mt19937_64(7, 700)[:313].tolist() == mt19937_64(7, 313).tolist()
    assert len(mt19937_64(7, 0)) == 0


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"short_probability": 0.1, "min_sentences": 2}, [[6, 9, 16], [4, 6, 16], [0, 4, 16]]),
        (
            {"short_probability": 0.5, "min_sentences": 2, "num_epochs": 3, "num_samples": 6},
            [[6, 9, 16], [4, 6, 8], [0, 4, 16], [6, 9, 13], [4, 6, 16], [0, 4, 14]],
        ),
        ({"short_probability": 0, "min_sentences": 1}, [[6, 9, 16], [4, 6, 16], [0, 4, 16]]),
    ],
)
def test_rows_are_those_of_megatrons_helper(settings, rows):
    mapping = build_mapping(DOCUMENTS, LENGTHS, max_length=16, seed=1234, **settings)
    assert mapping.tolist() == rows
    assert mapping.dtype == np.uint32


def test_a_large_mapping_is_that_of_the_cpp_loop():
    random = np.random.RandomState(0)
    counts = random.randint(0, 30, 2000)
    documents = np.concatenate([[0], np.cumsum(counts)])
    lengths = random.randint(0, 60, documents[-1]).astype(np.int32)
    lengths[random.randint(0, len(lengths), 100)] = 600
    mapping = build_mapping(
        documents, lengths, max_length=125, min_sentences=2, short_probability=0.15, seed=42, num_samples=10_000,
        num_epochs=None,
    )  # fmt: skip
    # of the same walk compiled with g++ on std::mt19937 and std::mt19937_64
    assert (
        hashlib.sha256(mapping.astype("<u4").tobytes()).hexdigest()
        == "f114c2066a4f1e7ff402d192ed37716366aa0d4d10a854ac1dd2e36a93a78fb1"
    )


@pytest.mark.parametrize("min_sentences", [1, 2, 3])
@pytest.mark.parametrize("short_probability", [0, 0.3, 1])
def test_rows_are_those_of_a_plain_walk(min_sentences, short_probability):
    random = np.random.RandomState(min_sentences)
    documents = np.concatenate([[0], np.cumsum(random.randint(0, 9, 100))])
    lengths = random.randint(0, 40, documents[-1]).astype(np.int32)
    lengths[::97] = 513
    mapping = build_mapping(
        documents,
        lengths,
        max_length=70,
        min_sentences=min_sentences,
        short_probability=short_probability,
        seed=9,
        num_epochs=2,
    )
    expected = plain_rows(documents, lengths, 70, min_sentences, short_probability, seed=9, epochs=2)
    assert sorted(mapping.tolist()) == sorted(expected)


def plain_rows(documents, lengths, max_length, min_sentences, short_probability, *, seed, epochs):
    """The rows before they are shuffled, sentence by sentence."""
    draws = mt19937(seed)

    def target():
        if short_probability == 0:
            return max_length
        draw = next(draws)
        short = draw % round(1 / short_probability) == 0
        return 2 + draw % (max_length - 1) if short else max_length

    rows = []
    for _ in range(epochs):
        for first, last in zip(documents[:-1], documents[1:], strict=True):
            sentences = list(range(first, last))
            too_long = len(sentences) > 1 and max(lengths[first:last]) > 512
            if len(sentences) < min_sentences or too_long:
                continue
            gathered, wanted = [], target()
            for sentence in sentences:
                gathered.append(sentence)
                left = last - sentence - 1
                enough = sum(lengths[gathered]) >= wanted and len(gathered) >= min_sentences
                if left == 0 or (enough and left > 1):
                    rows.append([gathered[0], sentence + 1, wanted])
                    gathered, wanted = [], target()
    return rows


def test_every_sentence_is_in_one_row_of_an_epoch():
    mapping = build_mapping(DOCUMENTS, LENGTHS, max_length=3, min_sentences=1, short_probability=0, seed=3)
    sentences = [sentence for first, last, _ in mapping.tolist() for sentence in range(first, last)]
    assert sorted(sentences) == list(range(9))


def test_a_mapping_without_rows_or_without_end_is_an_error():
    settings = {"max_length": 16, "short_probability": 0.1, "seed": 1}
    with pytest.raises(UserError, match="none of 3 documents has 5 sentences"):
        build_mapping(DOCUMENTS, LENGTHS, min_sentences=5, num_epochs=None, num_samples=10, **settings)
    with pytest.raises(UserError, match="an endless mapping"):
        build_mapping(DOCUMENTS, LENGTHS, min_sentences=2, num_epochs=None, **settings)

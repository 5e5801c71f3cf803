"""Every rule, by a document that breaks it and no other one."""

import numpy as np
import pytest

from jaxtron.curate.config import Length, Quality
from jaxtron.curate.criteria.hashing import words
from jaxtron.curate.criteria.quality import (
    broken_length,
    broken_rules,
    duplicate_ngram_share,
    repeated_ngrams,
    top_ngram_share,
)

LETTERS = "abcdefghijklmnop"


def sentence(i):
    """Eleven words, most of them found nowhere else."""
    unique = [f"{LETTERS[i % 16]}{LETTERS[i // 16]}{LETTERS[k]}{'word'}" for k in range(9)]
    return " ".join(["the", *unique[:4], "of", *unique[4:]]) + "."


def page(lines=10):
    return "\n".join(sentence(i) for i in range(lines))


def first_broken(text, **rules):
    return broken_rules([text], words([text]), Quality(**rules))[0]


def test_running_text_breaks_no_rule():
    assert first_broken(page()) is None
    assert first_broken(page(), min_sentences=5, min_terminal_lines=0.9, forbidden=("lorem ipsum", "{")) is None


# what repeats whole lines repeats their words
NO_NGRAMS: dict = {"max_top_ngram": (), "max_duplicate_ngrams": ()}
CASES = {
    "min_words": ("the house of cards", {}),
    "max_words": (page(), {"max_words": 100}),
    "min_mean_word_length": ("the of " + " ".join(f"{a} {b}" for a in LETTERS for b in LETTERS), {}),
    "max_mean_word_length": (page().replace("word", "wordwordword"), {}),
    "max_symbols_per_word": (page().replace("word ", "word# "), {}),
    "max_bullet_lines": ("\n".join(f"- {sentence(i)}" for i in range(10)), {}),
    "max_ellipsis_lines": ("\n".join(sentence(i) + ".." * (i < 4) for i in range(10)), {}),
    "min_alphabetic_words": (page() + "".join(f" {i}00" for i in range(100, 140)), {}),
    "min_stop_words": (page().replace("of", "ov"), {}),
    "max_duplicate_lines": (page() + "\nThe end" * 6, {}),
    "max_duplicate_line_characters": ("\n".join([page(), *[sentence(0)] * 3]), NO_NGRAMS),
    "max_duplicate_paragraphs": ("\n\n".join([page(), *["a\nb"] * 6]), {"max_duplicate_lines": 1}),
    "max_duplicate_paragraph_characters": (
        "\n\n".join([page().replace("\n", "\n\n"), *["\n".join([sentence(40), sentence(41)])] * 3]),
        {"max_duplicate_lines": 1, "max_duplicate_line_characters": 1} | NO_NGRAMS,
    ),
    "max_top_ngram[0]": (
        " ".join(f"{w} phantasmagorical kaleidoscopes" for w in page(3).split()),
        {"max_mean_word_length": 20, "max_duplicate_ngrams": ()},
    ),
    "max_duplicate_ngrams[0]": (" ".join([page(5), "and", *sentence(0).split()[:7]]), {}),
    "min_sentences": (page(4).replace(".", ""), {"min_sentences": 1, "min_words": 40}),
    "min_terminal_lines": (page().replace(".\n", "\n"), {"min_terminal_lines": 0.5}),
    "forbidden": (page() + " Lorem Ipsum", {"forbidden": ("lorem ipsum",)}),
}


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_has_a_document_that_breaks_it_alone(rule):
    text, rules = CASES[rule]
    broken = first_broken(text, **rules)
    assert broken is not None and broken[0] == f"quality.{rule}"
    off: dict = {rule.partition("[")[0]: () if rule == "forbidden" or "[" in rule else None}
    assert first_broken(text, **rules | off) is None


def test_documents_of_a_batch_do_not_mix():
    texts = [page(), "", sentence(0), CASES["max_duplicate_ngrams[0]"][0], page()]
    together = broken_rules(texts, words(texts), Quality())
    assert together == [first_broken(text) for text in texts]
    assert together[0] is None and together[1] == ("quality.min_words", 0)


def plain_shares(text, size):
    """The two shares by definition, slowly."""
    units = text.split()
    grams = [tuple(units[i : i + size]) for i in range(len(units) - size + 1)]
    covered = {i + k for i, gram in enumerate(grams) if grams.count(gram) > 1 for k in range(size)}
    letters = sum(map(len, units))
    repeated = [gram for gram in grams if grams.count(gram) > 1]
    most = max((grams.count(gram) for gram in repeated), default=0)
    top = max((sum(map(len, gram)) * most for gram in repeated if grams.count(gram) == most), default=0)
    return min(top / letters, 1.0), sum(len(units[i]) for i in covered) / letters


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_repeated_ngrams(seed):
    random = np.random.default_rng(seed)
    vocabulary = ["a", "bb", "ccc", "dddd"]
    texts = [" ".join(random.choice(vocabulary, random.integers(1, 40))) for _ in range(20)]
    units = words(texts)
    for size, repeated in repeated_ngrams(units, [2, 3, 5]).items():
        top, duplicate = top_ngram_share(units, repeated), duplicate_ngram_share(units, repeated)
        expected = np.array([plain_shares(text, size) for text in texts])
        np.testing.assert_allclose(top, expected[:, 0])
        np.testing.assert_allclose(duplicate, expected[:, 1])


def test_lengths():
    limits = Length(least=3, most=5)
    found = [broken_length("x" * n, limits) for n in range(2, 7)]
    assert found == [("length.least", 2), None, None, None, ("length.most", 6)]

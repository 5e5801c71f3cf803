"""Rules for running text: those of Gopher (Rae et al. 2021, appendix A) and a few of C4 (Raffel et al. 2020)."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from jaxtron.preprocess.curate.config import Length, Quality
from jaxtron.preprocess.curate.hashing import Units, ngrams

BULLETS = ("-", "*", "\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf", "\u25aa")
ELLIPSES = ("...", "\u2026")
TERMINAL = (".", "!", "?", '."', '!"', '?"', ".\u201d", "!\u201d", "?\u201d", ".)", "\u3002", "\uff01", "\uff1f")
PARAGRAPHS = re.compile(r"\n\s*\n")
SENTENCE_ENDS = re.compile(r"[.!?]+[\"')\u201d]*(?:\s|$)|[\u3002\uff01\uff1f]")
SHORTEST_TOP_NGRAM, SHORTEST_DUPLICATE_NGRAM = 2, 5

Broken = tuple[str, Any]
"""The rule that a document breaks, and the value that breaks it."""


def broken_length(text: str, limits: Length) -> Broken | None:
    """Whether a text is too short or too long, and its characters."""
    if len(text) < limits.least:
        return "length.least", len(text)
    if limits.most is not None and len(text) > limits.most:
        return "length.most", len(text)
    return None


def broken_rules(texts: Sequence[str], units: Units, rules: Quality) -> list[Broken | None]:
    """The first rule that each text breaks; `units` are the words of the texts."""
    measures = _Repetition(units, rules)
    return [_first_broken(text, rules, lambda d=d: measures.of(d)) for d, text in enumerate(texts)]


def _first_broken(
    text: str, rules: Quality, repetition: Callable[[], Iterator[tuple[str, float, float]]]
) -> Broken | None:
    words = text.split()
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    for name, value in _measures(text, words, lines, rules):
        limit = getattr(rules, name)
        if limit is not None and (value < limit if name.startswith("min_") else value > limit):
            return f"quality.{name}", _rounded(value)
    for name, value, limit in repetition():
        if value > limit:
            return f"quality.{name}", _rounded(value)
    if rules.forbidden:
        lower = text.lower()
        found = next((words for words in rules.forbidden if words.lower() in lower), None)
        if found is not None:
            return "quality.forbidden", found
    return None


def _measures(text: str, words: list[str], lines: list[str], rules: Quality) -> Iterator[tuple[str, float]]:
    """Every rule that is one number with one limit, cheap ones first."""
    num_words = max(len(words), 1)
    yield "min_words", len(words)
    yield "max_words", len(words)
    mean = sum(map(len, words)) / num_words
    yield "min_mean_word_length", mean
    yield "max_mean_word_length", mean
    yield "max_symbols_per_word", max(text.count("#"), sum(map(text.count, ELLIPSES))) / num_words
    yield "max_bullet_lines", _share(line.startswith(BULLETS) for line in lines)
    yield "max_ellipsis_lines", _share(line.endswith(ELLIPSES) for line in lines)
    if rules.min_alphabetic_words is not None:
        yield "min_alphabetic_words", _share(any(map(str.isalpha, word)) for word in words)
    if rules.min_stop_words is not None:
        present = {word.lower() for word in words}
        yield "min_stop_words", sum(word in present for word in rules.stop_words)
    repeated, characters = _repeated(lines)
    yield "max_duplicate_lines", repeated
    yield "max_duplicate_line_characters", characters
    paragraphs = [paragraph for paragraph in map(str.strip, PARAGRAPHS.split(text)) if paragraph]
    repeated, characters = _repeated(paragraphs)
    yield "max_duplicate_paragraphs", repeated
    yield "max_duplicate_paragraph_characters", characters
    if rules.min_sentences is not None:
        yield "min_sentences", len(SENTENCE_ENDS.findall(text))
    if rules.min_terminal_lines is not None:
        yield "min_terminal_lines", _share(line.endswith(TERMINAL) for line in lines)


class _Repetition:
    """How much of each document its repeated n-grams hold, all documents at once, longer n-grams only where needed."""

    def __init__(self, units: Units, rules: Quality):
        self._limits = [
            *((f"max_top_ngram[{i}]", SHORTEST_TOP_NGRAM + i, x) for i, x in enumerate(rules.max_top_ngram)),
            *(
                (f"max_duplicate_ngrams[{i}]", SHORTEST_DUPLICATE_NGRAM + i, x)
                for i, x in enumerate(rules.max_duplicate_ngrams)
            ),
        ]
        num_top = len(rules.max_top_ngram)
        self._shares = [
            (top_ngram_share if i < num_top else duplicate_ngram_share)(units, size)
            for i, (_, size, _) in enumerate(self._limits)
        ]

    def of(self, document: int) -> Iterator[tuple[str, float, float]]:
        """Name, value and limit of every rule about n-grams."""
        for (name, _, limit), shares in zip(self._limits, self._shares, strict=True):
            yield name, float(shares[document]), limit


def top_ngram_share(units: Units, size: int) -> Float64[np.ndarray, "D"]:
    """The share of each document's letters in its most frequent n-gram, if that occurs more than once.

    Among equally frequent ones the longest counts, as if occurrences did not overlap, and 1 at most.
    """
    places, documents, groups, counts = _grouped(units, size)
    letters = _letters(units, places, size) * counts[groups]
    # the most frequent, then the longest, comes last
    order = np.lexsort((letters, counts[groups], documents))
    order = order[counts[groups[order]] > 1]
    last = np.flatnonzero(np.diff(documents[order], append=-1))
    share = np.zeros(len(units.bounds) - 1)
    share[documents[order[last]]] = letters[order[last]]
    return np.minimum(share / _document_letters(units), 1.0)


def duplicate_ngram_share(units: Units, size: int) -> Float64[np.ndarray, "D"]:
    """The share of each document's letters in n-grams that occur more than once, each letter counted once."""
    places, _, groups, counts = _grouped(units, size)
    repeated = places[counts[groups] > 1]
    change = np.zeros(len(units.hashes) + 1, np.int64)
    np.add.at(change, repeated, 1)
    np.add.at(change, repeated + size, -1)
    covered = np.cumsum(change[:-1]) > 0
    before = np.concatenate([[0], np.cumsum(units.lengths * covered)])
    return np.diff(before[units.bounds]) / _document_letters(units)


def _grouped(
    units: Units, size: int
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Int64[np.ndarray, "G"]]:
    """Place, document and group of every n-gram, and how often each group occurs; groups are within a document."""
    hashes, places = ngrams(units, size)
    documents = np.searchsorted(units.bounds, places, side="right") - 1
    order = np.lexsort((hashes, documents))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(hashes[order]) != 0) | (np.diff(documents[order]) != 0)
    groups = np.empty(len(order), np.int64)
    groups[order] = np.cumsum(new) - 1
    return places, documents, groups, np.bincount(groups)


def _letters(units: Units, places: Int64[np.ndarray, "N"], size: int) -> Int64[np.ndarray, "N"]:
    before = np.concatenate([[0], np.cumsum(units.lengths)])
    return before[places + size] - before[places]


def _document_letters(units: Units) -> Int64[np.ndarray, "D"]:
    before = np.concatenate([[0], np.cumsum(units.lengths)])
    return np.maximum(np.diff(before[units.bounds]), 1)


def _repeated(parts: list[str]) -> tuple[float, float]:
    """The share of parts that are equal to an earlier one, and of their characters."""
    seen: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen:
            number += 1
            characters += len(part)
        seen.add(part)
    return number / max(len(parts), 1), characters / max(sum(map(len, parts)), 1)


def _share(marks: Iterable[bool]) -> float:
    known = list(marks)
    return sum(known) / max(len(known), 1)


def _rounded(value: float) -> float:
    return round(value, 4)

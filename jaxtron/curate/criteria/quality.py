"""Rules for running text: those of Gopher (Rae et al. 2021, appendix A) and a few of C4 (Raffel et al. 2020)."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from jaxtron.curate.config import Length, Quality
from jaxtron.curate.criteria.hashing import Units, mixed, ngrams_of_sizes

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
        yield "min_alphabetic_words", _share(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    if rules.min_stop_words is not None:
        present = set(text.lower().split())
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
    """How much of each document its repeated n-grams hold, all documents and sizes at once."""

    def __init__(self, units: Units, rules: Quality):
        top = [(SHORTEST_TOP_NGRAM + i, limit) for i, limit in enumerate(rules.max_top_ngram)]
        duplicate = [(SHORTEST_DUPLICATE_NGRAM + i, limit) for i, limit in enumerate(rules.max_duplicate_ngrams)]
        sizes = sorted({size for size, _ in [*top, *duplicate]})
        repeated = repeated_ngrams(units, sizes) if sizes else {}
        self._rules = [
            *((f"max_top_ngram[{i}]", top_ngram_share(units, repeated[n]), x) for i, (n, x) in enumerate(top)),
            *(
                (f"max_duplicate_ngrams[{i}]", duplicate_ngram_share(units, repeated[n]), x)
                for i, (n, x) in enumerate(duplicate)
            ),
        ]

    def of(self, document: int) -> Iterator[tuple[str, float, float]]:
        """Name, value and limit of every rule about n-grams."""
        for name, shares, limit in self._rules:
            yield name, float(shares[document]), limit


@dataclass(frozen=True)
class Repeated:
    """N-grams of one size that occur more than once in their document: place of each, and how often it occurs."""

    size: int
    places: Int64[np.ndarray, "N"]
    counts: Int64[np.ndarray, "N"]


def repeated_ngrams(units: Units, sizes: Sequence[int]) -> dict[int, Repeated]:
    """What every document repeats, by size."""
    found = {}
    document_hashes = mixed(np.arange(len(units.bounds) - 1, dtype=np.uint64))
    of_unit = np.repeat(document_hashes, np.diff(units.bounds))
    for size, (hashes, places) in ngrams_of_sizes(units, sizes).items():
        # documents are told apart within the hash: one sort does for all of them
        hashes = hashes ^ of_unit[places]
        order = np.argsort(hashes)
        starts = np.flatnonzero(np.diff(hashes[order]))
        starts = np.concatenate([np.zeros(min(len(order), 1), np.int64), starts + 1])
        times = np.diff(np.append(starts, len(order)))
        counts = np.repeat(times, times)
        found[size] = Repeated(size, places[order][counts > 1], counts[counts > 1])
    return found


def top_ngram_share(units: Units, repeated: Repeated) -> Float64[np.ndarray, "D"]:
    """The share of each document's letters in its most frequent n-gram, if that occurs more than once.

    Among equally frequent ones the longest counts, as if occurrences did not overlap, and 1 at most.
    """
    before = _letters_before(units)
    letters = (before[repeated.places + repeated.size] - before[repeated.places]) * repeated.counts
    documents = np.searchsorted(units.bounds, repeated.places, side="right") - 1
    # the most frequent, then the longest, comes last
    order = np.lexsort((letters, repeated.counts, documents))
    last = order[np.flatnonzero(np.diff(documents[order], append=-1))]
    share = np.zeros(len(units.bounds) - 1)
    share[documents[last]] = letters[last]
    return np.minimum(share / _document_letters(units), 1.0)


def duplicate_ngram_share(units: Units, repeated: Repeated) -> Float64[np.ndarray, "D"]:
    """The share of each document's letters in n-grams that occur more than once, each letter counted once."""
    change = np.zeros(len(units.hashes) + 1, np.int64)
    change[repeated.places] += 1
    change[repeated.places + repeated.size] -= 1
    covered = np.cumsum(change[:-1]) > 0
    before = np.concatenate([[0], np.cumsum(units.lengths * covered)])
    return np.diff(before[units.bounds]) / _document_letters(units)


def _letters_before(units: Units) -> Int64[np.ndarray, "Places"]:
    return np.concatenate([[0], np.cumsum(units.lengths)])


def _document_letters(units: Units) -> Int64[np.ndarray, "D"]:
    return np.maximum(np.diff(_letters_before(units)[units.bounds]), 1)


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

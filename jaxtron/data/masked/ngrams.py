"""Which whole-word n-grams of a sequence are masked, in Megatron's draws."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer

from jaxtron.config import UserError

GEOMETRIC_P = 0.2
"""SpanBERT (Joshi et al. 2020, section 3.1)."""


@dataclass(frozen=True)
class Masking:
    """What share of a sequence is masked, in n-grams of how many words; UserError for values out of range."""

    probability: float = 0.15
    max_ngram: int = 3
    """Words of the longest n-gram; 3 in Megatron's BERT, 10 in its T5."""
    geometric: bool = False
    """n from a geometric distribution with p = 0.2, cut at `max_ngram` (SpanBERT, T5); otherwise p(n) ~ 1/n."""
    longer_ngrams: bool = False
    """p(n) the other way round, so that the longest n-gram is the likeliest."""
    permute: bool = False
    """Also permute as many tokens among themselves, to be predicted too (BERT only)."""

    def __post_init__(self):
        if not 0 < self.probability < 1 or self.max_ngram < 1:
            raise UserError(
                f"masking probability {self.probability} and n-grams of up to {self.max_ngram} words; give a "
                "probability between 0 and 1 and at least 1 word"
            )
        if self.geometric and (self.longer_ngrams or self.permute):
            raise UserError("geometric n-grams go with neither longer_ngrams nor permute; choose one")

    def count(self, length: int, target_length: int) -> float:
        """Most tokens to mask of `length`, in a sample meant to have `target_length`; may be no whole number."""
        return min(self.probability * target_length, max(1, round(length * self.probability)))


def word_positions(
    candidates: Int64[np.ndarray, "C"], continues: Bool[np.ndarray, "C"] | None
) -> list[Int64[np.ndarray, "..."]]:
    """The candidate positions by words; `continues` says which of them go with the one before, None that none does."""
    if not len(candidates):
        return []
    begins = np.arange(1, len(candidates)) if continues is None else np.flatnonzero(~continues[1:]) + 1
    return np.split(candidates, begins)


class NgramChooser:
    """Draws n-grams of words that do not overlap until enough tokens are chosen.

    The words are shuffled once; from each in this order an n is drawn, and the n-gram that begins there is taken,
    shortened word by word if it has too many tokens, unless a token of it is taken already.
    """

    def __init__(self, words: list[Int64[np.ndarray, "..."]], masking: Masking, rng: np.random.RandomState):
        self._words = words
        self._masking = masking
        self._rng = rng
        self._order = np.arange(len(words))
        shares = 1 / np.arange(1, masking.max_ngram + 1)
        shares /= shares.sum()
        shares = (shares[::-1] if masking.longer_ngrams else shares).cumsum()
        # as RandomState.choice does it
        self._cumulative = shares / shares[-1]

    def choose(self, limit: float, *, taken: set[int]) -> Iterator[list[int]]:
        """Positions of each n-gram, at most `limit` in all, none in `taken`; the caller may draw in between."""
        self._rng.shuffle(self._order)
        words, count = self._words, 0
        for first in self._order.tolist():
            if count >= limit:
                return
            n = self._draw()
            ngram = np.concatenate(words[first : first + n]).tolist()
            while n > 1 and count + len(ngram) > limit:
                n -= 1
                ngram = np.concatenate(words[first : first + n]).tolist()
            if count + len(ngram) > limit or not taken.isdisjoint(ngram):
                continue
            taken.update(ngram)
            count += len(ngram)
            yield ngram

    def _draw(self) -> int:
        if self._masking.geometric:
            return min(int(self._rng.geometric(GEOMETRIC_P)), self._masking.max_ngram)
        return int(self._cumulative.searchsorted(self._rng.random_sample(), side="right")) + 1


def mask_tokens(
    tokens: Integer[np.ndarray, "S"],
    words: list[Int64[np.ndarray, "..."]],
    *,
    masking: Masking,
    target_length: int,
    rng: np.random.RandomState,
    replace: Callable[[np.random.RandomState], int | None],
) -> tuple[Integer[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """The tokens with some n-grams replaced, and which ones are to be predicted.

    `replace` draws what a masked token becomes, None for itself. Where tokens are permuted as well, Megatron draws the
    lengths of their n-grams from NumPy's global generator, so that its samples depend on what ran before; here they
    come from `rng`, like everything else of the sample.
    """
    limit = masking.count(len(tokens), target_length)
    chooser = NgramChooser(words, masking, rng)
    masked, taken = tokens.copy(), set()
    for ngram in chooser.choose(limit, taken=taken):
        for position in ngram:
            replacement = replace(rng)
            if replacement is not None:
                masked[position] = replacement
    if masking.permute:
        ngrams = list(chooser.choose(limit, taken=taken))
        positions = np.sort(np.concatenate([np.empty(0, np.int64), *ngrams]).astype(np.int64))
        masked[positions] = masked[rng.permutation(positions)]
    chosen = np.zeros(len(tokens), bool)
    chosen[list(taken)] = True
    return masked, chosen

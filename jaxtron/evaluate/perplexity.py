"""How well a model predicts a text: its tokens in overlapping windows, and the figures that follow."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from jaxtron.data.batch import TokenBatch
from jaxtron.data.tokenizers import CharacterTokenizer, Tokenizer

# Megatron's bound on the exponent of a perplexity
MOST_NATS = 20.0
# two letters of a script so rare that a tokenizer which tells them apart knows every character, by its bytes
RARE = ("\U00012000", "\U00012001")


class OverlappingWindows:
    """A `Source` of windows that begin `stride` tokens after one another; each scores what no earlier one did.

    The first scores all its targets, the others their last `stride`, whose context is at least `sequence_length -
    stride` tokens. So every token but the first is scored exactly once (Megatron's `--overlapping-eval`).
    """

    def __init__(self, tokens: Integer[np.ndarray, "T"], *, sequence_length: int, stride: int):
        assert 1 <= stride <= sequence_length and len(tokens) >= 2
        self.sequence_length = sequence_length
        self.stride = stride
        self._tokens = tokens
        self._length = 1 + max(0, -(-(len(tokens) - 1 - sequence_length) // stride))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> TokenBatch:
        if not 0 <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        start = index * self.stride
        window = self._tokens[start : start + self.sequence_length + 1].astype(np.int32)
        num_targets = len(window) - 1
        weights = np.zeros(self.sequence_length, np.float32)
        weights[0 if index == 0 else self.sequence_length - self.stride : num_targets] = 1
        window = np.pad(window, (0, self.sequence_length - num_targets))
        return TokenBatch(tokens=window[:-1], targets=window[1:], weights=weights)


@dataclass(frozen=True)
class Score:
    """What was measured of a text: the sum of negative log-likelihoods in nats, and what it is a sum over.

    `words` (split at spaces) and `text_bytes` (of UTF-8) are of the text before any detokenizer.
    """

    nll: float
    tokens: int
    words: int
    text_bytes: int

    @property
    def nll_per_token(self) -> float:
        """Mean over all tokens but the first, in nats."""
        return self.nll / (self.tokens - 1)

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return _perplexity(self.nll_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the text."""
        return self.nll / math.log(2) / self.text_bytes

    @property
    def token_ratio(self) -> float | None:
        """Tokens a word, the first of each left out; None for a single word."""
        return (self.tokens - 1) / (self.words - 1) if self.words > 1 else None

    @property
    def word_perplexity(self) -> float | None:
        """Of a word, as papers since GPT-2 give it (Megatron: adjusted ppl): it does not depend on the tokenizer."""
        return None if self.token_ratio is None else _perplexity(self.nll_per_token * self.token_ratio)


def num_words(text: str) -> int:
    """Words as Megatron counts them: what single spaces separate, line ends only where they stand between spaces."""
    return len(text.strip().split(" "))


def unknown_characters(text: str, tokenizer: Tokenizer) -> dict[str, int]:
    """Characters that the tokenizer drops or writes as its unknown token, and how often they are in the text."""
    if isinstance(tokenizer, CharacterTokenizer):
        # it refuses them
        return {}
    unknown, other = (tokenizer.encode(letter) for letter in RARE)
    if not np.array_equal(unknown, other):
        return {}
    letters = sorted(letter for letter in set(text) if not letter.isspace())
    ids = tokenizer.encode_batch(letters)
    return {
        letter: text.count(letter) for letter, found in zip(letters, ids, strict=True) if np.array_equal(found, unknown)
    }


def _perplexity(nats: float) -> float:
    return math.exp(min(MOST_NATS, nats))

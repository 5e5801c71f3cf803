"""Spans of a text: drawn, taken out, and put back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from jaxtron.data.masked.sample import SpanSample, pad


@dataclass(frozen=True)
class SpanVocabulary:
    """The special tokens of an encoder and decoder, and which others continue a word (None: every token is a word)."""

    begin: int
    """Comes first in the decoder."""
    end: int
    """Comes last in the targets."""
    pad: int
    sentinels: tuple[int, ...]
    """Stand for the first, second ... span that was taken out."""
    continues: Bool[np.ndarray, "V"] | None = None


def random_spans(
    length: int, *, rate: float, mean_length: float, rng: np.random.RandomState
) -> Int64[np.ndarray, "Spans 2"]:
    """(start, end) of spans that hold round(length * rate) tokens, at least 1 and at most all but 1.

    Their number is that of tokens over the mean length, rounded. Lengths of spans, and of the gaps of which one comes
    before each, are uniform over all ways to divide the tokens (Raffel et al. 2020, section 3.1.4).
    """
    assert length >= 2, "a span needs a gap before it"
    num_taken = min(max(round(length * rate), 1), length - 1)
    num_spans = min(max(round(num_taken / mean_length), 1), num_taken, length - num_taken)
    spans, gaps = _divide(num_taken, num_spans, rng), _divide(length - num_taken, num_spans, rng)
    ends = np.cumsum(spans + gaps)
    return np.stack([ends - spans, ends], axis=1)


def _divide(total: int, parts: int, rng: np.random.RandomState) -> Int64[np.ndarray, "Parts"]:
    """Positive numbers with this total, every such list equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]).astype(np.int64))


def fitting_spans(
    spans: Integer[np.ndarray, "Spans 2"], *, num_sentinels: int, decoder_length: int
) -> Integer[np.ndarray, "Kept 2"]:
    """The first spans, as many as there are sentinels for and as fit in the decoder; the others stay in the text."""
    # each span takes a sentinel and its tokens, all of them one token to begin
    used = 1 + np.cumsum(1 + spans[:, 1] - spans[:, 0])
    return spans[: min(num_sentinels, int(np.searchsorted(used, decoder_length, side="right")))]


def take_out(
    tokens: Integer[np.ndarray, "N"],
    spans: Integer[np.ndarray, "Spans 2"],
    *,
    vocabulary: SpanVocabulary,
    encoder_length: int,
    decoder_length: int,
    prefix: Sequence[int] = (),
) -> SpanSample:
    """The sample whose encoder sees prefix and text with a sentinel for each span, and whose decoder writes the spans.

    Spans are (start, end), in order and apart or adjacent. The decoder is given the begin token and each span after its
    sentinel; its targets are the same without the first, and the end token.
    """
    encoder, spoken, done = [np.asarray(prefix, np.int32)], [], 0
    for sentinel, (start, end) in zip(vocabulary.sentinels, spans.tolist(), strict=False):
        encoder += [tokens[done:start], [sentinel]]
        spoken += [[sentinel], tokens[start:end]]
        done = end
    encoder.append(tokens[done:])
    encoder_tokens, encoder_padding = pad(_joined(encoder), encoder_length, vocabulary.pad)
    decoder_tokens, decoder_padding = pad(_joined([[vocabulary.begin], *spoken]), decoder_length, vocabulary.pad)
    return SpanSample(
        encoder_tokens=encoder_tokens,
        encoder_padding=encoder_padding,
        decoder_tokens=decoder_tokens,
        targets=pad(_joined([*spoken, [vocabulary.end]]), decoder_length, vocabulary.pad)[0],
        weights=(~decoder_padding).astype(np.float32),
        decoder_padding=decoder_padding,
    )


def _joined(parts: Sequence[Sequence[int] | Integer[np.ndarray, "..."]]) -> Int32[np.ndarray, "N"]:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])

"""UL2's mixture of denoisers (Tay et al. 2022, arXiv 2205.05131, sections 3.1 and 4.2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.masked.sample import SpanSample
from jaxtron.data.masked.spans import SpanVocabulary, random_spans, take_out
from jaxtron.data.source import Source


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a text; UserError for values out of range."""

    rate: float
    """Share of the tokens that are taken out; on average for a sequential denoiser."""
    mean_length: float | None
    """Tokens of a span; None: sequential, one span at the end whose length is uniform around the rate."""
    mode: int | None = None
    """The token that comes first in the encoder, if any, to name the kind of denoiser."""
    weight: float = 1.0
    """Its share of the samples, relative to those of the others."""

    def __post_init__(self):
        if not 0 < self.rate < 1 or (self.mean_length is not None and self.mean_length < 1) or self.weight < 0:
            raise UserError(
                f"a denoiser that takes out {self.rate} of the tokens in spans of {self.mean_length} with weight "
                f"{self.weight}; give a rate between 0 and 1, spans of at least 1 token and no negative weight"
            )

    def draw(self, length: int, rng: np.random.RandomState) -> Integer[np.ndarray, "Spans 2"]:
        """(start, end) of the spans to take out of so many tokens."""
        if self.mean_length is not None:
            return random_spans(length, rate=self.rate, mean_length=self.mean_length, rng=rng)
        return np.array([[length - int(rng.randint(1, self._longest(length) + 1)), length]])

    def most_spans(self, length: int) -> int:
        """Spans that a text of `length` tokens has at most."""
        return 1 if self.mean_length is None else max(round(round(length * self.rate) / self.mean_length), 1)

    def decoder_length(self, length: int) -> int:
        """Decoder tokens that a text of `length` tokens takes at most."""
        taken = self._longest(length) if self.mean_length is None else max(round(length * self.rate), 1)
        return 1 + taken + self.most_spans(length)

    def _longest(self, length: int) -> int:
        # lengths 1 to 2 * rate * length - 1 are rate * length on average
        return min(max(round(2 * self.rate * length) - 1, 1), length - 1)


def ul2_denoisers(
    *,
    regular: int | None,
    extreme: int | None,
    sequential: int | None,
    weights: tuple[float, float, float] = (2 / 7, 4 / 7, 1 / 7),
) -> tuple[Denoiser, ...]:
    """The paper's seven denoisers: two R, four X and one S, whose mode tokens the arguments are.

    `weights` are the shares of the three kinds, divided evenly within each; by default every denoiser has the same.
    """
    r, x, s = weights[0] / 2, weights[1] / 4, weights[2]
    return (
        Denoiser(rate=0.15, mean_length=3, mode=regular, weight=r),
        Denoiser(rate=0.15, mean_length=8, mode=regular, weight=r),
        Denoiser(rate=0.5, mean_length=3, mode=extreme, weight=x),
        Denoiser(rate=0.5, mean_length=8, mode=extreme, weight=x),
        Denoiser(rate=0.15, mean_length=64, mode=extreme, weight=x),
        Denoiser(rate=0.5, mean_length=64, mode=extreme, weight=x),
        Denoiser(rate=0.25, mean_length=None, mode=sequential, weight=s),
    )


class Ul2Source:
    """Each sample of a decoder's source, corrupted by a denoiser that is drawn for it.

    The text is all of the sample's tokens, documents' ends included, as far as they weigh in the loss. Sample i draws
    from `RandomState((seed + i) % 2^32)`. UserError unless every sample fits whatever is drawn: an encoder one longer
    than the source's sequences is enough, the decoder's need is the largest `Denoiser.decoder_length`.
    """

    def __init__(
        self,
        source: Source,
        denoisers: Sequence[Denoiser],
        *,
        encoder_length: int,
        decoder_length: int,
        vocabulary: SpanVocabulary,
        seed: int,
    ):
        length = source.sequence_length
        weights = np.array([denoiser.weight for denoiser in denoisers])
        if length < 2 or not weights.sum() > 0:
            raise UserError(
                f"{len(denoisers)} denoisers with weights {weights.tolist()} for {length} tokens; give more"
            )
        used = [denoiser for denoiser in denoisers if denoiser.weight > 0]
        needs = {
            "encoder_length": (encoder_length, length + any(denoiser.mode is not None for denoiser in used)),
            "decoder_length": (decoder_length, max(denoiser.decoder_length(length) for denoiser in used)),
            "sentinels": (len(vocabulary.sentinels), max(denoiser.most_spans(length) for denoiser in used)),
        }
        for name, (given, needed) in needs.items():
            if given < needed:
                raise UserError(f"{name} {given} is too small for texts of {length} tokens; give at least {needed}")
        self.encoder_length = encoder_length
        self.decoder_length = decoder_length
        self._source = source
        self._denoisers = tuple(denoisers)
        self._cumulative = weights.cumsum() / weights.cumsum()[-1]
        self._vocabulary = vocabulary
        self._seed = seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> SpanSample:
        rng = np.random.RandomState((self._seed + index) % 2**32)
        text = self._text(index)
        denoiser = self._denoisers[int(self._cumulative.searchsorted(rng.random_sample(), side="right"))]
        # nothing can be taken out of one token
        spans = denoiser.draw(len(text), rng) if len(text) > 1 else np.empty((0, 2), np.int64)
        return take_out(
            text,
            spans,
            vocabulary=self._vocabulary,
            encoder_length=self.encoder_length,
            decoder_length=self.decoder_length,
            prefix=() if denoiser.mode is None else (denoiser.mode,),
        )

    def _text(self, index: int) -> Integer[np.ndarray, "N"]:
        sample = self._source[index]
        real = np.flatnonzero(sample.weights)
        return sample.tokens[: int(real[-1]) + 1 if len(real) else 0]

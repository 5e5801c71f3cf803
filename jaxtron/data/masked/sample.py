"""What models that are not plain decoders read: one masked sequence, or one for the encoder and one for the decoder."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped


@dataclass(frozen=True)
class MaskedSample:
    """`[CLS] A [SEP] B [SEP]` with some tokens replaced, for an encoder that predicts them."""

    tokens: Int32[np.ndarray, "S"]
    targets: Int32[np.ndarray, "S"]
    """The tokens before any was replaced."""
    weights: Float32[np.ndarray, "S"]
    """1 where a token is to be predicted, 0 elsewhere."""
    token_types: Int32[np.ndarray, "S"]
    """0 up to the first `[SEP]`, 1 up to the second, 0 in the padding."""
    padding: Bool[np.ndarray, "S"]
    """True beyond the sample's end; nothing may attend there."""
    is_swapped: bool
    """B came before A in the text; False where there is no pair."""


@dataclass(frozen=True)
class SpanSample:
    """A text with spans taken out for the encoder (S), and those spans for the decoder (T)."""

    encoder_tokens: Int32[np.ndarray, "S"]
    encoder_padding: Bool[np.ndarray, "S"]
    """True beyond the sample's end; nothing may attend there."""
    decoder_tokens: Int32[np.ndarray, "T"]
    targets: Int32[np.ndarray, "T"]
    """For each decoder token the one after it, which ends with the end of sequence."""
    weights: Float32[np.ndarray, "T"]
    decoder_padding: Bool[np.ndarray, "T"]


def pad(
    ids: Shaped[np.ndarray, "Length"], length: int, fill: int
) -> tuple[Int32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """The ids filled up to the length, and where they were."""
    assert len(ids) <= length, f"{len(ids)} tokens do not fit in {length}"
    padded = np.full(length, fill, np.int32)
    padded[: len(ids)] = ids
    return padded, np.arange(length) >= len(ids)

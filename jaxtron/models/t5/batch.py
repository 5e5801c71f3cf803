"""What a T5 reads of a step: texts for the encoder, and what the decoder is to write of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxtron.config import UserError
from jaxtron.data.batch import SECOND_SEQUENCE, SEQUENCE, rows, weight
from jaxtron.data.masked.sample import SpanSample

TOKENS = "tokens"


@dataclass(frozen=True)
class T5Batch:
    """Rows of the encoder's tokens and of the decoder's; segments are 1, and 0 in padding, which text does not see."""

    tokens: Int[Any, "*B S"] = rows(SEQUENCE)
    segments: Int[Any, "*B S"] = rows(SEQUENCE)
    decoder_tokens: Int[Any, "*B T"] = rows(SECOND_SEQUENCE)
    decoder_segments: Int[Any, "*B T"] = rows(SECOND_SEQUENCE)
    targets: Int[Any, "*B T"] = rows(SECOND_SEQUENCE)
    """The token after each of the decoder's."""
    weights: Float[Any, "*B T"] = weight(SECOND_SEQUENCE, normalizes=TOKENS)


def from_sample(sample: SpanSample) -> T5Batch:
    """A row."""
    return T5Batch(
        sample.encoder_tokens,
        (~sample.encoder_padding).astype(np.int32),
        sample.decoder_tokens,
        (~sample.decoder_padding).astype(np.int32),
        sample.targets,
        sample.weights,
    )


def of_tokens(
    tokens: Int[np.ndarray, "B S"], is_text: Bool[np.ndarray, "B S"], decoder_tokens: Int[np.ndarray, "B T"] | None
) -> T5Batch:
    """Rows that weigh nothing; what follows a token of the decoder changes nothing of it, so that none is padding."""
    if decoder_tokens is None:
        raise UserError('a T5 reads a text and writes another: give {"tokens": [...], "decoder_tokens": [...]}')
    here, weights = np.ones_like(decoder_tokens), np.zeros(decoder_tokens.shape, np.float32)
    return T5Batch(tokens, is_text.astype(np.int32), decoder_tokens, here, decoder_tokens, weights)

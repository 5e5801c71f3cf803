"""What BERT reads of a step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxtron.config import UserError
from jaxtron.data.batch import SEQUENCE, rows, weight
from jaxtron.data.masked.sample import MaskedSample

# normalizers of the two losses
MASKED, PAIRS = "masked tokens", "pairs"


@dataclass(frozen=True)
class BertBatch:
    """Texts with masked tokens, what these were, and whether the parts of each do not follow each other as they are."""

    tokens: Int[Any, "*B S"] = rows(SEQUENCE)
    targets: Int[Any, "*B S"] = rows(SEQUENCE)
    """The tokens before any was masked."""
    weights: Float[Any, "*B S"] = weight(SEQUENCE, normalizes=MASKED)
    """Above 0 where a token is to be predicted."""
    token_types: Int[Any, "*B S"] = rows(SEQUENCE)
    """0 in the first part and 1 in the second."""
    segments: Int[Any, "*B S"] = rows(SEQUENCE)
    """1 in the text, 0 in padding: neither sees the other."""
    is_swapped: Int[Any, "*B"] = rows()
    """1 where the parts were swapped, or the second is of another document."""
    pair_weights: Float[Any, "*B"] = weight(normalizes=PAIRS)
    """0 where there is no pair."""


def from_sample(sample: MaskedSample, *, has_pair: bool) -> BertBatch:
    """A sample of `data/masked` as one row."""
    return BertBatch(
        tokens=sample.tokens,
        targets=sample.targets,
        weights=sample.weights,
        token_types=sample.token_types,
        segments=1 - sample.padding.astype(np.int32),
        is_swapped=np.asarray(sample.is_swapped, np.int32),
        pair_weights=np.asarray(has_pair, np.float32),
    )


def of_tokens(
    tokens: Int[np.ndarray, "B S"], is_text: Bool[np.ndarray, "B S"], decoder_tokens: Int[np.ndarray, "B T"] | None
) -> BertBatch:
    """Rows of one part that weigh nothing; padding is another segment."""
    if decoder_tokens is not None:
        raise UserError("a BERT has no decoder: give rows of tokens alone, [[...], ...]")
    nothing, of_row = np.zeros(tokens.shape, np.float32), np.zeros(len(tokens), np.int32)
    return BertBatch(
        tokens=tokens,
        targets=tokens,
        weights=nothing,
        token_types=np.zeros_like(tokens),
        segments=is_text.astype(np.int32),
        is_swapped=of_row,
        pair_weights=of_row.astype(np.float32),
    )

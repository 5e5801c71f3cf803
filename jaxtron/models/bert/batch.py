"""What BERT reads of a step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

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

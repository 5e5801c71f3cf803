"""From the tokens of one sequence to a sample: targets, padding, and what an end of document changes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch


@dataclass(frozen=True)
class Boundaries:
    """What happens at an end-of-document token, which belongs to the document that it ends."""

    end_of_document: int | None = None
    mask_loss: bool = False
    """What follows an end of document is no target: another document's first token cannot be predicted."""
    reset_positions: bool = False
    """Positions start again at 0 after it."""
    reset_attention: bool = False
    """Tokens after it do not see those before it."""

    def __post_init__(self):
        asked = [name for name in ("mask_loss", "reset_positions", "reset_attention") if getattr(self, name)]
        if asked and self.end_of_document is None:
            raise UserError(
                f"{' and '.join(asked)} have no effect: the tokenizer has no end of document; leave them out or give it"
            )


def make_sample(text: Int32[np.ndarray, "T"], *, sequence_length: int, boundaries: Boundaries) -> TokenBatch:
    """A sample from up to `sequence_length` + 1 tokens: each of the first `sequence_length` predicts the next one.

    Where tokens are missing the sample is padded with 0, of weight 0. Padding is known by its place, so a pad id equal
    to the end of document, or to any other, loses no target.
    """
    assert len(text) <= sequence_length + 1, f"{len(text)} tokens for a sequence of {sequence_length}"
    tokens, targets = np.zeros((2, sequence_length), np.int32)
    num_tokens, num_targets = min(len(text), sequence_length), max(len(text) - 1, 0)
    tokens[:num_tokens] = text[:num_tokens]
    targets[:num_targets] = text[1:]
    weights = np.zeros(sequence_length, np.float32)
    weights[:num_targets] = 1
    if not (boundaries.mask_loss or boundaries.reset_positions or boundaries.reset_attention):
        return TokenBatch(tokens=tokens, targets=targets, weights=weights)
    is_end = tokens == boundaries.end_of_document
    is_end[num_tokens:] = False
    if boundaries.mask_loss:
        weights[is_end] = 0
    segments = np.cumsum(is_end, dtype=np.int32) - is_end
    starts = np.concatenate([[0], np.flatnonzero(is_end) + 1])
    positions = (np.arange(sequence_length) - starts[segments]).astype(np.int32)
    return TokenBatch(
        tokens=tokens,
        targets=targets,
        weights=weights,
        positions=positions if boundaries.reset_positions else None,
        segments=segments if boundaries.reset_attention else None,
    )

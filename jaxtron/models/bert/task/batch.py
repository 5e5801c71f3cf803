"""What a BERT with a task reads of a step."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int

from jaxtron.data.batch import SEQUENCE, rows, weight

# the axis of an example's texts, and what its weights count
TEXTS, EXAMPLES = "texts", "examples"


@dataclass(frozen=True)
class TaskBatch:
    """Examples of one text or of several, and of each which class or text is right."""

    tokens: Int[Any, "*B C S"] = rows(TEXTS, SEQUENCE)
    token_types: Int[Any, "*B C S"] = rows(TEXTS, SEQUENCE)
    segments: Int[Any, "*B C S"] = rows(TEXTS, SEQUENCE)
    """1 in the text, 0 in padding: neither sees the other."""
    label: Int[Any, "*B"] = rows()
    weights: Float[Any, "*B"] = weight(normalizes=EXAMPLES)

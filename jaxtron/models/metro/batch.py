"""What METRO-LM reads of a step."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int

from jaxtron.data.batch import SEQUENCE, rows, weight

# the axis of masked places, and normalizers of the losses
PLACES = "places"
MASKED, TOKENS = "masked tokens", "tokens"


@dataclass(frozen=True)
class MetroBatch:
    """Texts with masked tokens, what these were, and where they are."""

    tokens: Int[Any, "*B S"] = rows(SEQUENCE)
    targets: Int[Any, "*B S"] = rows(SEQUENCE)
    """The tokens before any was masked."""
    segments: Int[Any, "*B S"] = rows(SEQUENCE)
    """1 in the text, 0 in padding: neither sees the other."""
    weights: Float[Any, "*B S"] = weight(SEQUENCE, normalizes=TOKENS)
    """1 in the text: of each token is told whether it was replaced."""
    places: Int[Any, "*B P"] = rows(PLACES)
    """Of each masked token its place in the whole sequence; -1 where there are fewer."""
    place_weights: Float[Any, "*B P"] = weight(PLACES, normalizes=MASKED)
    """1 where there is a place."""

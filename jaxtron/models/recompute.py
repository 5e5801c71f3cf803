"""What the backward pass computes again instead of keeping: named regions, and gathered arrays always."""

from collections.abc import Callable
from typing import Any

import jax

# A gathered array is its device's part plus communication: keep the part and gather again. These are the gathers of
# weights over the batch axes and of the sequence over tensor (Explicit: `reshard`).
GATHERS = frozenset({"all_gather", "reshard"})


def keep_all_but_gathers(primitive: Any, *_: Any, **__: Any) -> bool:
    """Checkpoint policy of a layer that recomputes nothing: keep everything computed, gather again what was gathered."""
    return primitive.name not in GATHERS


def region(name: str, recomputed: frozenset[str], function: Callable) -> Callable:
    """`function`, computed again in the backward if `name` is among the recomputed regions."""
    return jax.checkpoint(function, prevent_cse=False) if name in recomputed else function


def layer(recomputed: frozenset[str], function: Callable, *, gathers: bool) -> Callable:
    """A scanned layer under its policy; `gathers`: whether it has gathers that must not be kept."""
    if "layer" in recomputed:
        return jax.checkpoint(function, prevent_cse=False)
    return jax.checkpoint(function, prevent_cse=False, policy=keep_all_but_gathers) if gathers else function

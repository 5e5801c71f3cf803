"""The arithmetic of dropout: a number is kept or not by 16 random bits."""

import jax.numpy as jnp

from jaxtron.typing import Array, Bool, Float


def threshold(rate: float) -> int:
    """Of 65536 numbers the lowest so many are dropped."""
    return round(rate * 65536)


def scale(rate: float) -> float:
    """Factor of what is kept, which keeps the expectation; of `rate` as drawn."""
    return 1.0 / (1.0 - threshold(rate) / 65536)


def drop(x: Float[Array, "..."], mask: Bool[Array, "..."], rate: float) -> Float[Array, "..."]:
    """`x` where the mask is, scaled to keep its expectation, else 0."""
    return jnp.where(mask, x / (1.0 - threshold(rate) / 65536), jnp.zeros((), x.dtype)).astype(x.dtype)

"""The arithmetic of dropout."""

import jax.numpy as jnp

from jaxtron.typing import Array, Bool, Float


def drop(x: Float[Array, "..."], mask: Bool[Array, "..."], rate: float) -> Float[Array, "..."]:
    """`x` where the mask is, scaled to keep its expectation, else 0; `rate` as drawn, from 16 bits."""
    return jnp.where(mask, x / (1.0 - round(rate * 65536) / 65536), jnp.zeros((), x.dtype)).astype(x.dtype)

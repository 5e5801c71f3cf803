"""`reference`: plain mathematics, for tests; never selected."""

import jax
import jax.numpy as jnp

from jaxtron.kernels.weight_sums.spec import Operand
from jaxtron.typing import Array, Float, Int


def unsupported_reason(x: Operand, cotangent: Operand, device_kind: str) -> str | None:
    """None: it takes anything."""
    return None


def add(
    sums: Float[Array, "L I O"], x: Float[Array, "R I"], cotangent: Float[Array, "R O"], slot: Int[Array, ""]
) -> Float[Array, "L I O"]:
    """`sums` with `x^T cotangent` added at `slot`."""
    made = jnp.dot(x.astype(jnp.float32).T, cotangent.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return sums.at[slot].add(made)

"""Grouped products as their definition says, expert by expert in float32: what the others are held to.

Every expert multiplies all rows, so products are those of the number of experts.
"""

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.spec import TILE, Operand
from jaxtron.typing import Array, Bool, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST


def unsupported_reason(rows: Operand, kernel: Operand, device_kind: str) -> str | None:
    """None: it computes on any device, arrays of any size and type."""
    return None


def product(
    rows: Float[Array, "R I"], kernel: Float[Array, "N I O"], tile_experts: Int[Array, " tiles"]
) -> Float[Array, "R O"]:
    """Each row times the kernel of its expert."""
    made = sum(
        jnp.dot(_only(rows, tile_experts, expert), kernel[expert].astype(jnp.float32), precision=HIGHEST)
        for expert in range(kernel.shape[0])
    )
    return jnp.asarray(made, rows.dtype)


def product_transposed(
    rows: Float[Array, "R O"], kernel: Float[Array, "N I O"], tile_experts: Int[Array, " tiles"]
) -> Float[Array, "R I"]:
    """Each row times the transpose of its expert's kernel."""
    return product(rows, kernel.swapaxes(1, 2), tile_experts)


def gradient(
    rows: Float[Array, "R I"], cotangent: Float[Array, "R O"], tile_experts: Int[Array, " tiles"], num_experts: int
) -> Float[Array, "N I O"]:
    """Of each expert its rows' transpose times their cotangent."""
    made = [
        jnp.dot(_only(rows, tile_experts, expert).T, _only(cotangent, tile_experts, expert), precision=HIGHEST)
        for expert in range(num_experts)
    ]
    return jnp.stack(made)


def _only(rows: Array, tile_experts: Array, expert: int) -> Array:
    """In float32, with zeros in the rows of other experts."""
    return jnp.where(_has(tile_experts, expert), rows.astype(jnp.float32), 0.0)


def _has(tile_experts: Array, expert: int) -> Bool[Array, "R 1"]:
    return jnp.repeat(tile_experts == expert, TILE)[:, None]

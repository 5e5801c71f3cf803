"""Products of rows with the kernels of their experts: batched where a bucket is an expert, else grouped, by tile."""

import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul import grouped_matmul
from jaxtron.layers.moe.exchange import Exchange, Turn
from jaxtron.typing import Array, Float


def product(exchange: Exchange, turn: Turn, rows: Float[Array, "*rows I"], kernel: Float[Array, "N I *O"]) -> Array:
    """Each row times its expert's kernel: [*rows, *O]."""
    if exchange.grouped is None:
        return jnp.einsum("nri,ni...->nr...", rows, kernel)
    assert turn.groups is not None
    made = grouped_matmul.product(rows, _flat(kernel), turn.groups.tile_experts, exchange.grouped)
    return made.reshape(rows.shape[0], *kernel.shape[2:])


def product_transposed(
    exchange: Exchange, turn: Turn, rows: Float[Array, "*rows O"], kernel: Float[Array, "N I *O"]
) -> Array:
    """Each row, of all that kernels give in one dimension, times the transpose of its expert's: [*rows, I]."""
    if exchange.grouped is None:
        return jnp.einsum("nro,nio->nri", rows, _flat(kernel))
    assert turn.groups is not None
    return grouped_matmul.product_transposed(rows, _flat(kernel), turn.groups.tile_experts, exchange.grouped)


def gradient(
    exchange: Exchange, turn: Turn, rows: Float[Array, "*rows I"], cotangent: Float[Array, "*rows O"]
) -> Float[Array, "N I O"]:
    """Of the kernels, in float32."""
    if exchange.grouped is None:
        return jnp.einsum("nri,nro->nio", rows, cotangent, preferred_element_type=jnp.float32)
    assert turn.groups is not None
    experts = exchange.own_experts
    return grouped_matmul.gradient(rows, cotangent, turn.groups.tile_experts, experts, exchange.grouped)


def _flat(kernel: Array) -> Float[Array, "N I O"]:
    return kernel.reshape(*kernel.shape[:2], -1)

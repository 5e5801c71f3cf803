"""Grouped products in plain JAX: a loop over the tiles that have rows, each times a slice of the kernels.

It runs anywhere. Products are those of the tiles alone, and no kernel is copied but the slice in use.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.spec import TILE, Operand
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Float, Int


def unsupported_reason(rows: Operand, kernel: Operand, device_kind: str) -> str | None:
    """None: it computes on any device, arrays of any size and type."""
    return None


def product(
    rows: Float[Array, "R I"], kernel: Float[Array, "N I O"], tile_experts: Int[Array, " tiles"]
) -> Float[Array, "R O"]:
    """Each row times the kernel of its expert."""
    return _products("ri,io->ro", rows, kernel, tile_experts, kernel.shape[2])


def product_transposed(
    rows: Float[Array, "R O"], kernel: Float[Array, "N I O"], tile_experts: Int[Array, " tiles"]
) -> Float[Array, "R I"]:
    """Each row times the transpose of its expert's kernel."""
    return _products("ro,io->ri", rows, kernel, tile_experts, kernel.shape[1])


def gradient(
    rows: Float[Array, "R I"], cotangent: Float[Array, "R O"], tile_experts: Int[Array, " tiles"], num_experts: int
) -> Float[Array, "N I O"]:
    """Of each expert its rows' transpose times their cotangent, added up tile by tile."""

    def add(tile: Array, sums: Array) -> Array:
        expert = tile_experts[tile]
        made = _multiply("ri,ro->io", _tile(rows, tile), _tile(cotangent, tile))
        return jax.lax.dynamic_update_index_in_dim(sums, _slice(sums, expert) + made, expert, 0)

    shape = (num_experts, rows.shape[1], cotangent.shape[1])
    return _over_tiles(add, jnp.zeros(shape, jnp.float32), (rows, cotangent, tile_experts), tile_experts, num_experts)


def _products(equation: str, rows: Array, kernel: Array, tile_experts: Array, width: int) -> Array:
    def write(tile: Array, made: Array) -> Array:
        out = _multiply(equation, _tile(rows, tile), _slice(kernel, tile_experts[tile]))
        return jax.lax.dynamic_update_slice_in_dim(made, out.astype(made.dtype), tile * TILE, 0)

    made = jnp.zeros((rows.shape[0], width), rows.dtype)
    return _over_tiles(write, made, (rows, kernel, tile_experts), tile_experts, kernel.shape[0])


def _over_tiles(
    step: Callable[[Array, Array], Array], start: Array, inputs: tuple[Array, ...], tile_experts: Array, experts: int
) -> Array:
    """What `step` makes of `start`, once for each tile that has rows."""
    start, *_ = vary_alike((start, *inputs))
    if not tile_experts.size:
        return start
    used = jnp.sum(tile_experts < experts, dtype=jnp.int32)
    return jax.lax.fori_loop(0, used, step, start)


def _multiply(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _tile(rows: Array, tile: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(rows, tile * TILE, TILE)


def _slice(kernel: Array, expert: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False)

"""What grouped products are given: rows by expert, in tiles that have one expert each.

Rows [R, I] of an expert are contiguous and its first is at a multiple of `TILE`; what fills its last tile are zeros.
`tile_experts` [R / TILE] has the expert of each tile, non-decreasing; tiles that are empty have the number of experts
there and are last. Kernels are [N, I, O].
"""

import jax
import jax.numpy as jnp

from jaxtron.config import UserError
from jaxtron.kernels.grouped_matmul.config import TILE
from jaxtron.typing import Array

TYPES = ("bfloat16", "float16", "float32")
# rows or kernels, or what stands for their shape and type
Operand = Array | jax.ShapeDtypeStruct


def check_product(rows: Operand, kernel: Operand, tile_experts: Operand, *, transposed: bool = False) -> None:
    """Raises `UserError` where sizes and types of a product by the kernels, or by their transposes, do not fit."""
    fits = kernel.ndim == 3 and rows.shape[-1] == kernel.shape[2 if transposed else 1]
    _check(rows, kernel, tile_experts, fits, f"[R, {'O' if transposed else 'I'}], [N, I, O]")


def check_gradient(rows: Operand, cotangent: Operand, tile_experts: Operand) -> None:
    """Raises `UserError` where sizes and types of the kernels' gradient do not fit."""
    fits = cotangent.ndim == 2 and rows.shape[0] == cotangent.shape[0]
    _check(rows, cotangent, tile_experts, fits, "[R, I], [R, O]")


def _check(left: Operand, right: Operand, tile_experts: Operand, fits: bool, words: str) -> None:
    if left.shape[0] % TILE:
        raise UserError(f"grouped product of {left.shape[0]:,} rows: they must be a multiple of {TILE}")
    if not fits or left.ndim != 2 or tile_experts.shape != (left.shape[0] // TILE,):
        raise UserError(
            f"grouped product of {left.shape} and {right.shape}, with tiles' experts {tile_experts.shape}, "
            f"does not fit: {words}, [R / {TILE}]"
        )
    if left.dtype != right.dtype or jnp.dtype(left.dtype).name not in TYPES:
        raise UserError(
            f"grouped product of {left.dtype} and {right.dtype}: both must be of one type of {', '.join(TYPES)}"
        )
    if not jnp.issubdtype(tile_experts.dtype, jnp.integer):
        raise UserError(f"grouped product with tiles' experts of type {tile_experts.dtype}: they must be integers")

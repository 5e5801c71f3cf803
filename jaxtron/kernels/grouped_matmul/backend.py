"""Which implementation computes grouped products.

- `mosaic`: our kernels for Hopper.
- `xla`: plain JAX, one tile of rows after the other, anywhere.
- `reference`: plain mathematics, every expert times all rows; never selected by `auto`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul import mosaic, reference, xla
from jaxtron.kernels.grouped_matmul.grouped_matmul import GroupedProducts
from jaxtron.kernels.grouped_matmul.spec import TILE, Operand
from jaxtron.kernels.selection import Backend, select
from jaxtron.typing import DTypeLike

IMPLEMENTATIONS: Mapping[str, GroupedProducts] = {"mosaic": mosaic, "xla": xla, "reference": reference}


def has_kernel(dtype: DTypeLike, device_kind: str) -> bool:
    """Whether devices of this kind have a kernel that multiplies numbers of this type as fast as whole products: the
    loop over tiles on a CPU, the kernels for Hopper."""
    if device_kind == "cpu":
        return True
    rows = jax.ShapeDtypeStruct((TILE, TILE), jnp.dtype(dtype))
    return mosaic.unsupported_reason(rows, jax.ShapeDtypeStruct((1, TILE, TILE), rows.dtype), device_kind) is None


def select_backend(name: str, rows: Operand, kernel: Operand, device_kind: str) -> Backend[GroupedProducts]:
    """The backend for rows [R, I] and kernels [N, I, O] on devices of this kind (`jax.Device.device_kind`).

    It is of all three products. `UserError` where the one that was named cannot; `auto` falls through to the next that
    can.
    """
    return select(
        name,
        IMPLEMENTATIONS,
        lambda products: products.unsupported_reason(rows, kernel, device_kind),
        device_kind,
        what="grouped products",
        setting="model.moe.implementation",
    )

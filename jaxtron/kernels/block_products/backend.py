"""Which implementation multiplies 8-bit numbers with scales of blocks.

- `mosaic`: our kernel for Hopper.
- `xla`: as wide numbers, anywhere.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtron.kernels.block_products import mosaic, xla
from jaxtron.kernels.block_products.rounding import E4M3
from jaxtron.kernels.block_products.spec import BLOCK, BlockProducts, Operand, Rounded
from jaxtron.kernels.selection import AUTO, Backend, select
from jaxtron.typing import Array, DTypeLike, Float

IMPLEMENTATIONS: Mapping[str, BlockProducts] = {"mosaic": mosaic, "xla": xla}


def product(left: Rounded, right: Rounded, dtype: DTypeLike, device_kind: str) -> Float[Array, "M N"]:
    """The product by the fastest that can make it on devices of this kind (`jax.Device.device_kind`)."""
    shapes = [Operand(*(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in operand)) for operand in (left, right)]
    return _select(*shapes, dtype, device_kind).implementation.product(left, right, dtype)


def select_backend(dtype: DTypeLike, device_kind: str) -> Backend[BlockProducts]:
    """What multiplies wherever widths are whole tiles."""
    values = jax.ShapeDtypeStruct((1, BLOCK, BLOCK), E4M3)
    whole = Operand(values, jax.ShapeDtypeStruct((1, 1, BLOCK), jnp.float32))
    return _select(whole, whole, dtype, device_kind)


def _select(left: Operand, right: Operand, dtype: DTypeLike, device_kind: str) -> Backend[BlockProducts]:
    return select(
        AUTO,
        IMPLEMENTATIONS,
        lambda products: products.unsupported_reason(left, right, dtype, device_kind),
        device_kind,
        what="products of blocks of 8-bit numbers",
        setting="model.fp8.scaling",
    )

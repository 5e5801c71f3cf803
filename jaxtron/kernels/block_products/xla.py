"""`xla`: numbers times their scales, in the result's type, multiplied as wide numbers: anywhere.

Both are powers of two apart, so what is multiplied is what a kernel multiplies; sums are in another order.
"""

import jax

from jaxtron.kernels.block_products.rounding import spread
from jaxtron.kernels.block_products.spec import Operand, Rounded
from jaxtron.typing import Array, DTypeLike, Float


def unsupported_reason(left: Operand, right: Operand, dtype: DTypeLike, device_kind: str) -> str | None:
    """None: it takes anything."""
    return None


def product(left: Rounded, right: Rounded, dtype: DTypeLike) -> Float[Array, "M N"]:
    """The sum over all that is contracted of both."""
    # what was rounded stays so: XLA may leave out a conversion to fewer bits and back
    left, right = jax.lax.optimization_barrier((left, right))
    contracted = (((0, 2), (0, 2)), ((), ()))
    return jax.lax.dot_general(_wide(left, dtype), _wide(right, dtype), contracted, preferred_element_type=dtype)


def _wide(rounded: Rounded, dtype: DTypeLike) -> Array:
    parts, height, width = rounded.values.shape
    scales = rounded.scales
    if scales.shape[2] != height:
        scales = spread(scales, 2, height)
    return rounded.values.astype(dtype) * spread(scales.swapaxes(1, 2), 2, width).astype(dtype)

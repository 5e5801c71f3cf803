"""Grouped products' public functions, which layers call: forward, and the two that are its derivatives.

They are not differentiated themselves: who calls them has a derivative around all that it computes.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.spec import Operand, check_gradient, check_product
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Float, Int


@runtime_checkable
class GroupedProducts(Protocol):
    """One way to compute grouped products; a module of this package is one.

    All accumulate in float32. Tiles whose expert is the number of experts cost no products where that is worth
    something, and give zeros whatever is in them.
    """

    def unsupported_reason(self, rows: Operand, kernel: Operand, device_kind: str) -> str | None:
        """Why it cannot compute the three products of arrays of these shapes and types on devices of this kind
        (`jax.Device.device_kind`); none: it can."""
        ...

    def product(
        self, rows: Float[Array, "R I"], kernel: Float[Array, "N I O"], tile_experts: Int[Array, " tiles"], /
    ) -> Float[Array, "R O"]:
        """As the function of this name."""
        ...

    def product_transposed(
        self, rows: Float[Array, "R O"], kernel: Float[Array, "N I O"], tile_experts: Int[Array, " tiles"], /
    ) -> Float[Array, "R I"]:
        """As the function of this name."""
        ...

    def gradient(
        self,
        rows: Float[Array, "R I"],
        cotangent: Float[Array, "R O"],
        tile_experts: Int[Array, " tiles"],
        num_experts: int,
        /,
    ) -> Float[Array, "N I O"]:
        """As the function of this name."""
        ...


def product(
    rows: Float[Array, "R I"],
    kernel: Float[Array, "N I O"],
    tile_experts: Int[Array, " tiles"],
    implementation: GroupedProducts,
) -> Float[Array, "R O"]:
    """Each row times the kernel of its tile's expert, in the rows' type; zeros in tiles that are empty.

    `UserError` for sizes and types that do not fit.
    """
    check_product(rows, kernel, tile_experts)
    return implementation.product(*vary_alike((rows, kernel, jnp.asarray(tile_experts, jnp.int32))))


def product_transposed(
    rows: Float[Array, "R O"],
    kernel: Float[Array, "N I O"],
    tile_experts: Int[Array, " tiles"],
    implementation: GroupedProducts,
) -> Float[Array, "R I"]:
    """Each row times the transpose of its expert's kernel, of which no copy is made: gradients of what entered
    `product`.

    `UserError` for sizes and types that do not fit.
    """
    check_product(rows, kernel, tile_experts, transposed=True)
    return implementation.product_transposed(*vary_alike((rows, kernel, jnp.asarray(tile_experts, jnp.int32))))


def gradient(
    rows: Float[Array, "R I"],
    cotangent: Float[Array, "R O"],
    tile_experts: Int[Array, " tiles"],
    num_experts: int,
    implementation: GroupedProducts,
) -> Float[Array, "N I O"]:
    """Of each expert its rows' transpose times their cotangent, in float32: gradients of `product`'s kernels.

    Zeros for experts without rows. `UserError` for sizes and types that do not fit.
    """
    check_gradient(rows, cotangent, tile_experts)
    arrays = vary_alike((rows, cotangent, jnp.asarray(tile_experts, jnp.int32)))
    return implementation.gradient(*arrays, num_experts)

"""Products of 8-bit numbers for training (2209.05433): e4m3 forward, e5m2 gradients, scaled by each tensor's maximum.

A tensor is divided by a power of two that brings its largest number into the format's range, and rounded. Powers of two
are exact, so a product is scaled back in its own type, and what comes out hardly depends on who computed the maximum.
Scales are made of the tensor at hand: nothing is in the state, and nothing can be stale. The maximum is that of the
whole tensor, over all devices that have a part of a microbatch: scales are the same on every mesh.

What is sent over `tensor` goes as 8 bits: inputs are gathered, and gradients of outputs, after they are rounded.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.kernels.block_products.rounding import divided, power_of_two
from jaxtron.layers.saved import save_for_backward
from jaxtron.sharding.collectives import largest, manual_axes, vary
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, DTypeLike, Float

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


class Form(NamedTuple):
    """How a product's arrays lie: rows first, contracted dimensions behind them; of the kernel, contracted first."""

    num_rows: int
    """Dimensions of rows (one, or batch and sequence)."""
    output: PartitionSpec
    """How the product is wanted."""
    multiplied: PartitionSpec
    """How the input lies where it is multiplied."""
    gradient: PartitionSpec
    """How the output's gradient lies where it is multiplied."""


def scale_of(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, ""]:
    """The power of two by which the tensor is divided so that its largest number is in the range of `dtype`.

    What is not finite makes the product not finite.
    """
    peak = jnp.max(jnp.abs(x)).astype(jnp.float32)
    rules, manual = current(), manual_axes()
    axes = tuple(axis for axis in rules.axes("data", "fsdp", "context") if axis in manual and rules.size((axis,)) > 1)
    peak = vary(largest(peak, axes) if axes else peak)
    return power_of_two(peak, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "..."], kernel: Float[Array, "..."], form: Form) -> Float[Array, "..."]:
    """`x` contracted with the kernel, in the type of `x`; the backward keeps what it is given, and scales."""
    return _forward(x, kernel, form)[0]


def _forward(x: Array, kernel: Array, form: Form) -> tuple[Array, tuple[Array, ...]]:
    x_scale, kernel_scale = (save_for_backward(scale_of(array, FORWARD)) for array in (x, kernel))
    rows = jax.sharding.reshard(divided(x, x_scale, FORWARD), form.multiplied)
    dims = tuple(range(form.num_rows, x.ndim)), tuple(range(x.ndim - form.num_rows))
    y = _dot(rows, divided(kernel, kernel_scale, FORWARD), dims, form.output, x_scale * kernel_scale, x.dtype)
    return y, (x, kernel, x_scale, kernel_scale)


def _backward(form: Form, kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array]:
    x, kernel, x_scale, kernel_scale = kept
    dy_scale = scale_of(dy, GRADIENT)
    dy = jax.sharding.reshard(divided(dy, dy_scale, GRADIENT), form.gradient)
    num_inputs, of_rows = x.ndim - form.num_rows, tuple(range(form.num_rows))
    dims = tuple(range(form.num_rows, dy.ndim)), tuple(range(num_inputs, kernel.ndim))
    weights = divided(kernel, kernel_scale, FORWARD)
    dx = _dot(dy, weights, dims, jax.typeof(x).sharding.spec, dy_scale * kernel_scale, x.dtype)
    rows = jax.sharding.reshard(divided(x, x_scale, FORWARD), form.multiplied)
    spec = jax.typeof(kernel).sharding.spec
    return dx, _dot(rows, dy, (of_rows, of_rows), spec, x_scale * dy_scale, kernel.dtype)


product.defvjp(_forward, _backward)


def _dot(
    left: Array,
    right: Array,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    layout: PartitionSpec,
    scale: Float[Array, ""],
    dtype: DTypeLike,
) -> Array:
    """The product times `scale`, both in `dtype`: the form that XLA makes one 8-bit product of, scale and all."""
    y = jax.lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=dtype, out_sharding=layout)
    return y * scale.astype(dtype)

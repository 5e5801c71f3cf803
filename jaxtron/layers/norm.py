"""Normalization, in float32 whatever the precision of its input."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.sharding import parameter
from jaxtron.typing import Array, Float

NormKind = Literal["layer_norm", "layer_norm_1p", "rms_norm"]


class Norm(nnx.Module):
    """LayerNorm (Ba et al., 1607.06450), LayerNorm whose stored scale is gamma - 1, or RMSNorm (1910.07467)."""

    def __init__(self, size: int, *, kind: NormKind, bias: bool, epsilon: float, rngs: nnx.Rngs) -> None:
        self.kind = kind
        self.epsilon = epsilon
        initial = initializers.zeros if kind == "layer_norm_1p" else initializers.ones
        self.scale = parameter(rngs, initial, (size,), axes=("norm",), role="scale")
        has_bias = bias and kind != "rms_norm"
        self.bias = parameter(rngs, initializers.zeros, (size,), axes=("norm",), role="bias") if has_bias else None

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        scale = self.scale[...].astype(jnp.float32)
        if self.kind == "layer_norm_1p":
            scale = scale + 1.0
        y = normalize(x, scale, self.kind != "rms_norm", self.epsilon)
        return y if self.bias is None else (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def normalize(
    x: Float[Array, "... E"], scale: Float[Array, "E"], centered: bool, epsilon: float
) -> Float[Array, "... E"]:
    """`x` (less its mean if `centered`) over its root mean square, times `scale`.

    The backward keeps `x` and one or two numbers a row, not the float32 arrays between.
    """
    return _normalize(x, scale, centered, epsilon)[0]


def _normalize(x: Array, scale: Array, centered: bool, epsilon: float) -> tuple[Array, Array | None, Array]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True) if centered else None
    wide = wide if mean is None else wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype), mean, inverse


def _forward(x: Array, scale: Array, centered: bool, epsilon: float) -> tuple[Array, tuple]:
    y, mean, inverse = _normalize(x, scale, centered, epsilon)
    return y, (x, scale, mean, inverse)


def _backward(centered: bool, epsilon: float, residuals: tuple, cotangent: Array) -> tuple[Array, Array]:
    x, scale, mean, inverse = residuals
    cotangent = cotangent.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    unit = (wide if mean is None else wide - mean) * inverse
    pulled = cotangent * scale
    dx = pulled - unit * jnp.mean(pulled * unit, -1, keepdims=True)
    if centered:
        dx = dx - pulled.mean(-1, keepdims=True)
    dscale = jnp.sum(cotangent * unit, tuple(range(x.ndim - 1)))
    return (dx * inverse).astype(x.dtype), dscale


normalize.defvjp(_forward, _backward)

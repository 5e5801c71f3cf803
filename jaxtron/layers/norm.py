"""Normalization, in float32 whatever the precision of its input."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.layers.config import NormKind
from jaxtron.sharding.parameters import parameter
from jaxtron.typing import Array, Float


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
        bias = None if self.bias is None else self.bias[...].astype(jnp.float32)
        return normalize(x, scale, bias, self.kind != "rms_norm", self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "... E"], scale: Float[Array, "E"], bias: Float[Array, "E"] | None, centered: bool, epsilon: float
) -> Float[Array, "... E"]:
    """`x` (less its mean if `centered`) over its root mean square, times `scale`, plus `bias`; float32 inside.

    The backward keeps `x` and one or two numbers a row, not the float32 arrays between.
    """
    return _normalize(x, scale, bias, centered, epsilon)[0]


def _normalize(
    x: Array, scale: Array, bias: Array | None, centered: bool, epsilon: float
) -> tuple[Array, Array | None, Array]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True) if centered else None
    wide = wide if mean is None else wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
    y = wide * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype), mean, inverse


def _forward(
    x: Array, scale: Array, bias: Array | None, centered: bool, epsilon: float
) -> tuple[Array, tuple[Array | None, ...]]:
    y, mean, inverse = _normalize(x, scale, bias, centered, epsilon)
    return y, (x, scale, bias, mean, inverse)


def _backward(centered: bool, epsilon: float, residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array | None]:
    x, scale, bias, mean, inverse = residuals
    cotangent = cotangent.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    unit = (wide if mean is None else wide - mean) * inverse
    pulled = cotangent * scale
    dx = pulled - unit * jnp.mean(pulled * unit, -1, keepdims=True)
    if centered:
        dx = dx - pulled.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    dbias = None if bias is None else jnp.sum(cotangent, rows)
    return (dx * inverse).astype(x.dtype), jnp.sum(cotangent * unit, rows), dbias


normalize.defvjp(_forward, _backward)

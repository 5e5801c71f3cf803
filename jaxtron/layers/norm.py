"""Normalization, in float32 whatever the precision of its input."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.layers.config import CENTERED, FROM_ONE, NormKind
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain
from jaxtron.typing import Array, Float


class Norm(nnx.Module):
    """LayerNorm (Ba et al., 1607.06450) or RMSNorm (1910.07467), each also with a stored scale that is gamma - 1."""

    def __init__(self, size: int, *, kind: NormKind, bias: bool, epsilon: float, rngs: nnx.Rngs) -> None:
        self.kind = kind
        self.epsilon = epsilon
        initial = initializers.zeros if kind in FROM_ONE else initializers.ones
        self.scale = parameter(rngs, initial, (size,), axes=("norm",), role="scale")
        has_bias = bias and kind in CENTERED
        self.bias = parameter(rngs, initializers.zeros, (size,), axes=("norm",), role="bias") if has_bias else None

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        scale = self.scale[...].astype(jnp.float32)
        if self.kind in FROM_ONE:
            scale = scale + 1.0
        bias = None if self.bias is None else self.bias[...].astype(jnp.float32)
        return normalize(x, scale, bias, self.kind in CENTERED, self.epsilon)


class HeadNorm(nnx.Module):
    """A norm of heads with scales for each channel of each: of a head by itself, or of all heads as one vector.

    Where several parts of `mesh.tensor` share a head, they have copies of it, which count as one.
    """

    def __init__(
        self,
        heads: Mapping[str, int],
        head_dim: int,
        *,
        as_one: bool,
        kind: NormKind,
        bias: bool,
        epsilon: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.as_one, self.kind, self.epsilon = as_one, kind, epsilon
        ((axis, count),) = heads.items()
        shape, axes = (count, head_dim), (axis, "head_dim")
        initial = initializers.zeros if kind in FROM_ONE else initializers.ones
        self.scale = parameter(rngs, initial, shape, axes=axes, role="scale")
        has_bias = bias and kind in CENTERED
        self.bias = parameter(rngs, initializers.zeros, shape, axes=axes, role="bias") if has_bias else None

    def __call__(self, x: Float[Array, "B S H D"]) -> Float[Array, "B S H D"]:
        scale = self._of(x.shape[2], self.scale[...])
        if self.kind in FROM_ONE:
            scale = scale + 1.0
        bias = None if self.bias is None else self._of(x.shape[2], self.bias[...])
        return normalize(x, scale, bias, self.kind in CENTERED, self.epsilon, 2 if self.as_one else 1)

    def _of(self, heads: int, values: Float[Array, "K D"]) -> Float[Array, "H D"]:
        """In float32, of so many heads, neighbours of which are copies."""
        values = values.astype(jnp.float32)
        if heads == len(values):
            return values
        shape = (len(values), heads // len(values), values.shape[1])
        copies = jnp.broadcast_to(values[:, None], shape).reshape(heads, -1)
        return constrain(copies, "heads", "head_dim")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
    x: Float[Array, "... E"],
    scale: Float[Array, "*heads E"],
    bias: Float[Array, "*heads E"] | None,
    centered: bool,
    epsilon: float,
    axes: int = 1,
) -> Float[Array, "... E"]:
    """`x` (less its mean if `centered`) over its root mean square, times `scale`, plus `bias`; float32 inside.

    Means are over so many last axes.
    The backward keeps `x` and one or two numbers a row, not the float32 arrays between.
    """
    return _normalize(x, scale, bias, centered, epsilon, axes)[0]


def _normalize(
    x: Array, scale: Array, bias: Array | None, centered: bool, epsilon: float, axes: int
) -> tuple[Array, Array | None, Array]:
    wide, last = x.astype(jnp.float32), tuple(range(-axes, 0))
    mean = wide.mean(last, keepdims=True) if centered else None
    wide = wide if mean is None else wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), last, keepdims=True) + epsilon)
    y = wide * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype), mean, inverse


def _forward(
    x: Array, scale: Array, bias: Array | None, centered: bool, epsilon: float, axes: int
) -> tuple[Array, tuple[Array | None, ...]]:
    y, mean, inverse = _normalize(x, scale, bias, centered, epsilon, axes)
    return y, (x, scale, bias, mean, inverse)


def _backward(
    centered: bool, epsilon: float, axes: int, residuals: tuple, cotangent: Array
) -> tuple[Array, Array, Array | None]:
    x, scale, bias, mean, inverse = residuals
    last = tuple(range(-axes, 0))
    cotangent = cotangent.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    unit = (wide if mean is None else wide - mean) * inverse
    pulled = cotangent * scale
    dx = pulled - unit * jnp.mean(pulled * unit, last, keepdims=True)
    if centered:
        dx = dx - pulled.mean(last, keepdims=True)
    rows = tuple(range(x.ndim - scale.ndim))
    dbias = None if bias is None else jnp.sum(cotangent, rows)
    return (dx * inverse).astype(x.dtype), jnp.sum(cotangent * unit, rows), dbias


normalize.defvjp(_forward, _backward)

"""Normalization, in float32 whatever the precision of its input."""

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
        wide = x.astype(jnp.float32)
        if self.kind != "rms_norm":
            wide = wide - wide.mean(-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), -1, keepdims=True)
        y = wide * jax.lax.rsqrt(variance + self.epsilon)
        scale = self.scale[...].astype(jnp.float32)
        y = y * (scale + 1.0 if self.kind == "layer_norm_1p" else scale)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)

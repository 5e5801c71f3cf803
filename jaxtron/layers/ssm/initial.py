"""First values of state-space layers, and the parameters of their convolutions."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.ssm.config import MambaConfig, Range
from jaxtron.sharding.parameters import Initializer, parameter
from jaxtron.typing import Array, DTypeLike


class Taps(nnx.Module):
    """Weights of a convolution of each channel by itself, and its bias; first values are PyTorch's `Conv1d`'s."""

    def __init__(self, width: int, channels: dict[str, int], rngs: nnx.Rngs) -> None:
        self.kernel = taps(width, channels, rngs)
        initial = uniform(-1 / math.sqrt(width), 1 / math.sqrt(width))
        self.bias = parameter(rngs, initial, tuple(channels.values()), axes=tuple(channels), role="bias")


def taps(width: int, channels: dict[str, int], rngs: nnx.Rngs) -> nnx.Param:
    """The weights alone."""
    shape, axes, bound = (width, *channels.values()), ("taps", *channels), 1 / math.sqrt(width)
    return parameter(rngs, uniform(-bound, bound), shape, axes=axes, role="kernel")


def uniform(low: float, high: float) -> Initializer:
    """Uniform between these."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def first_steps(config: MambaConfig) -> Initializer:
    """What softplus makes log-uniform steps of (Mamba, 2312.00752, section 3.6)."""
    low, high = config.dt_range

    def initial(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        steps = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        steps = jnp.maximum(steps, config.dt_floor)
        return steps + jnp.log(-jnp.expm1(-steps))

    return initial


def first_decays(bounds: Range) -> Initializer:
    """Logarithms of uniform rates."""
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, *bounds))


def counted_decays(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Logarithms of 1, 2, 3, ... for the numbers of each channel's state (S4D-Real; Mamba, 2312.00752, section 3.6)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)

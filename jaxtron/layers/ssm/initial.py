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
        bound, shape, names = 1 / math.sqrt(width), tuple(channels.values()), tuple(channels)
        initial = uniform(-bound, bound)
        self.kernel = parameter(rngs, initial, (width, *shape), axes=("taps", *names), role="kernel")
        self.bias = parameter(rngs, initial, shape, axes=names, role="bias")


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

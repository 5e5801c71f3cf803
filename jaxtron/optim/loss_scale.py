"""Dynamic loss scale for float16: as large as the gradients' range allows (Megatron's `DynamicGradScaler`)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxtron.optim.config import LossScaleConfig
from jaxtron.typing import Array, Bool, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=("scale", "finite_steps", "overflows_left"), meta_fields=())
@dataclass(frozen=True)
class LossScale:
    """The scale, the finite steps since it last changed or overflowed, and the overflows left before it backs off."""

    scale: Float[Array, ""]
    finite_steps: Int[Array, ""]
    overflows_left: Int[Array, ""]


def initial_loss_scale(config: LossScaleConfig) -> LossScale:
    """Return the state before the first step."""
    return LossScale(
        scale=jnp.float32(config.initial),
        finite_steps=jnp.int32(0),
        overflows_left=jnp.int32(config.hysteresis),
    )


def update_loss_scale(state: LossScale, finite: Bool[Array, ""], config: LossScaleConfig) -> LossScale:
    """Return the state after a step whose gradients were `finite` or not; pure and traceable."""
    finite_steps = jnp.where(finite, state.finite_steps + 1, 0)
    overflows_left = jnp.where(finite, state.overflows_left, jnp.maximum(state.overflows_left - 1, 0))
    grows = finite_steps == config.window
    backs_off = ~finite & (overflows_left == 0)
    scale = jnp.where(grows, state.scale * config.growth, state.scale)
    scale = jnp.where(backs_off, jnp.maximum(scale * config.backoff, config.minimum), scale)
    return LossScale(
        scale=scale,
        finite_steps=jnp.where(grows, 0, finite_steps),
        overflows_left=jnp.where(grows, config.hysteresis, overflows_left),
    )

"""Dynamic loss scale for float16: as large as the gradients' range allows (Megatron's `DynamicGradScaler`)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxtron.optim.config import LARGEST_LOSS_SCALE, LossScaleConfig
from jaxtron.typing import Array, Bool, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=("scale", "finite_steps", "overflows_left"), meta_fields=())
@dataclass(frozen=True)
class LossScale:
    """The scale, its steps in a row, and the overflows left before it backs off.

    `finite_steps` are those in a row since the scale last changed; below zero they are overflows in a row.
    """

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
    row = state.finite_steps
    row = jnp.where(finite, jnp.maximum(row, 0) + 1, jnp.minimum(row, 0) - 1)
    overflows_left = jnp.where(finite, state.overflows_left, jnp.maximum(state.overflows_left - 1, 0))
    grows = row == config.window
    backs_off = ~finite & (overflows_left == 0)
    scale = jnp.where(grows, jnp.minimum(state.scale * config.growth, LARGEST_LOSS_SCALE), state.scale)
    scale = jnp.where(backs_off, jnp.maximum(scale * config.backoff, config.minimum), scale)
    return LossScale(
        scale=scale,
        finite_steps=jnp.where(grows | (scale != state.scale), 0, row),
        overflows_left=jnp.where(grows, config.hysteresis, overflows_left),
    )


def overflows_in_a_row(state: LossScale) -> int:
    """Steps up to the last that overflowed one after the other, since the scale last changed."""
    return max(0, -int(state.finite_steps))

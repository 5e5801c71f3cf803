"""Dynamic loss scale for float16: as large as the gradients' range allows (Megatron's `DynamicGradScaler`)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from jaxtron.config import Config, UserError
from jaxtron.typing import Array, Bool, Float, Int


class LossScaleConfig(Config):
    """When the loss scale grows and when it backs off."""

    initial: float = Field(
        default=2.0**16, gt=0, description="first scale; Megatron's 2**32 skips its first dozen steps"
    )
    minimum: float = Field(default=1.0, gt=0, description="smallest scale")
    growth: float = Field(default=2.0, gt=1, description="factor of growth after a window without overflow")
    backoff: float = Field(default=0.5, gt=0, lt=1, description="factor on overflow, once hysteresis is used up")
    window: int = Field(default=1000, gt=0, description="consecutive finite steps before the scale grows")
    hysteresis: int = Field(default=2, gt=0, description="overflows before the scale backs off, renewed when it grows")

    @model_validator(mode="after")
    def _check_minimum(self) -> "LossScaleConfig":
        if self.minimum > self.initial:
            raise UserError(f"minimum={self.minimum} is above initial={self.initial}: lower it")
        return self


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

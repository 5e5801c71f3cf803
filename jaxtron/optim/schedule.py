"""Learning rate as a function of the update."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxtron.config import UserError
from jaxtron.optim.config import AnnealStyle, OptimizerConfig
from jaxtron.typing import Array, Float

LearningRate = Callable[[ArrayLike], Float[Array, ""]]


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> LearningRate:
    """Return the learning rate of update `step`, counted from 0; traceable, float32.

    Warm-up is nanoGPT's, `learning_rate * (step + 1) / (warmup_steps + 1)`, so that no update has rate 0 (Megatron's
    first one has). From `step == warmup_steps`, the peak, on it is Megatron's and nanoGPT's: the minimum is reached
    at `step == decay_steps` and kept. A run no longer than its warm-up only warms up. UserError where the parts of
    `warmup_stable_decay` do not fit.
    """
    warmup_steps = config.warmup_steps
    decay_steps = config.decay_steps or max(total_steps, warmup_steps + 1)
    peak, minimum = config.learning_rate, config.minimum_learning_rate
    match config.schedule:
        case "constant":
            course = optax.constant_schedule(peak)
        case "linear":
            course = optax.linear_schedule(peak, minimum, decay_steps - warmup_steps)
        case "cosine":
            course = optax.cosine_decay_schedule(peak, decay_steps - warmup_steps, alpha=minimum / peak)
        case "inverse_square_root":
            course = _inverse_square_root(peak, minimum, warmup_steps)
        case "warmup_stable_decay":
            course = _stable_decay(config, decay_steps)
    if warmup_steps > 0:
        warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
        course = optax.join_schedules([warmup, course], [warmup_steps])
    return lambda step: jnp.asarray(course(step), jnp.float32)


def _inverse_square_root(peak: float, minimum: float, warmup_steps: int) -> optax.Schedule:
    start = max(warmup_steps, 1)

    def course(step):
        return jnp.maximum(minimum, peak * math.sqrt(start) / jnp.sqrt(jnp.maximum(step + warmup_steps, start)))

    return course


def _stable_decay(config: OptimizerConfig, decay_steps: int) -> optax.Schedule:
    peak, minimum = config.learning_rate, config.minimum_learning_rate
    anneal_steps = config.anneal_steps or max(1, min(decay_steps // 10, decay_steps - config.warmup_steps))
    stable_steps = decay_steps - config.warmup_steps - anneal_steps
    if stable_steps < 0:
        raise UserError(
            f"optimizer.warmup_steps {config.warmup_steps} and optimizer.anneal_steps {anneal_steps} do not fit into "
            f"optimizer.decay_steps {decay_steps}: shorten one of them or train for longer"
        )

    def anneal(step):
        ratio = jnp.clip(step / anneal_steps, 0.0, 1.0)
        return minimum + (peak - minimum) * _anneal_coefficient(config.anneal_style, ratio)

    return optax.join_schedules([optax.constant_schedule(peak), anneal], [stable_steps])


def _anneal_coefficient(style: AnnealStyle, ratio: Float[Array, ""]) -> Float[Array, ""]:
    match style:
        case "linear":
            return 1.0 - ratio
        case "cosine":
            return 0.5 * (1.0 + jnp.cos(jnp.pi * ratio))
        case "exponential":
            return 2.0 * 0.5**ratio - 1.0
        case "minus_square_root":
            return 1.0 - jnp.sqrt(ratio)

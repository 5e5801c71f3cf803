"""Steps that are not applied: their loss or gradient is not finite, or far above what it was lately."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxtron.optim.config import HealthConfig
from jaxtron.typing import Array, Bool, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=("norms", "losses", "good", "bad", "row"), meta_fields=())
@dataclass(frozen=True)
class Health:
    """Gradient norms and losses of the last good steps, oldest replaced first, and how many steps were what.

    `good` are the steps that were applied, `bad` those that were not, and `row` the bad ones in a row up to the last.
    """

    norms: Float[Array, "W"]
    losses: Float[Array, "W"]
    good: Int[Array, ""]
    bad: Int[Array, ""]
    row: Int[Array, ""]


def initial_health(config: HealthConfig) -> Health:
    """The state before the first step."""
    empty = jnp.zeros(config.window, jnp.float32)
    return Health(empty, empty, jnp.int32(0), jnp.int32(0), jnp.int32(0))


def is_good(state: Health, loss: Float[Array, ""], norm: Float[Array, ""], config: HealthConfig) -> Bool[Array, ""]:
    """Whether a step with this loss and this norm of its gradients, before clipping, is to be applied.

    Both are finite, and not above so many times their median over the last `window` good steps, once there were so
    many (PaLM, 2204.02311, sec. 5.1, saw such spikes some twenty times).
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    is_known = state.good >= config.window
    for limit, value, history in (
        (config.gradient_spike, norm, state.norms),
        (config.loss_spike, loss, state.losses),
    ):
        if limit is not None:
            # of an even number the lower of the two in the middle
            median = jnp.sort(history)[(config.window - 1) // 2]
            good &= ~is_known | (value <= limit * median)
    return good


def after_step(state: Health, good: Bool[Array, ""], loss: Float[Array, ""], norm: Float[Array, ""]) -> Health:
    """The state after a step that was `good` or not; pure and traceable."""
    place = state.good % state.norms.shape[0]

    def put(history: Float[Array, "W"], value: Float[Array, ""]) -> Float[Array, "W"]:
        return jnp.where(good, history.at[place].set(value), history)

    return Health(
        norms=put(state.norms, norm),
        losses=put(state.losses, loss),
        good=state.good + good,
        bad=state.bad + ~good,
        row=jnp.where(good, 0, state.row + 1),
    )

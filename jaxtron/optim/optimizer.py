"""AdamW and SGD as optax chains, weight decay by the role of a parameter, and clipping by global norm."""

from typing import get_args

import jax
import jax.numpy as jnp
import optax

from jaxtron.optim.config import OptimizerConfig
from jaxtron.roles import Role
from jaxtron.typing import Array, Float, PyTree

# Megatron's and PyTorch's: keeps a zero gradient from dividing by zero
CLIP_EPSILON = 1e-6


def make_optimizer(config: OptimizerConfig, roles: PyTree) -> optax.GradientTransformation:
    """Return the rule that makes directions of gradients, for `descend`, for parameters whose tree `roles` mirrors
    with a `Role` at each leaf.

    AdamW decays decoupled, `p -= rate * (update + decay * p)`; SGD decays through the gradient, before momentum: both
    as PyTorch and Megatron. Moments are float32 and sharded as their parameters. Clipping is not in the chain: call
    `clip_by_global_norm` first.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config, roles))
    match config.name:
        case "adamw":
            adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
            return _in_float32(optax.chain(adam, decay))
        case "sgd":
            momentum = optax.trace(config.momentum, config.nesterov) if config.momentum > 0 else optax.identity()
            return _in_float32(optax.chain(decay, momentum))


def descend(params: PyTree, directions: PyTree, learning_rate: Float[Array, ""]) -> PyTree:
    """The parameters after a step against the directions, each in its own type."""
    return optax.apply_updates(params, jax.tree.map(lambda direction: -learning_rate * direction, directions))


def decay_mask(config: OptimizerConfig, roles: PyTree) -> PyTree:
    """Return `roles` with True where the parameter decays; ValueError on a leaf that is no `Role`."""
    unknown = set(jax.tree.leaves(roles)) - set(get_args(Role))
    if unknown:
        raise ValueError(f"unknown parameter roles {sorted(unknown)}: use one of {', '.join(get_args(Role))}")
    return jax.tree.map(lambda role: role in config.decay_roles, roles)


def clip_by_global_norm(gradients: PyTree, clip_norm: float) -> tuple[PyTree, Float[Array, ""]]:
    """Return the gradients scaled to at most `clip_norm` (0: unchanged) and their float32 norm before that.

    The arrays are global: a sharded one counts once, a replicated one once. A NaN or infinity among the gradients
    makes the norm non-finite, which is the test for a step to skip.
    """
    squares = [jnp.sum(jnp.square(gradient.astype(jnp.float32))) for gradient in jax.tree.leaves(gradients)]
    norm = jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))
    if clip_norm == 0:
        return gradients, norm
    factor = jnp.minimum(1.0, clip_norm / (norm + CLIP_EPSILON))
    clipped = jax.tree.map(lambda gradient: (gradient * factor).astype(gradient.dtype), gradients)
    return clipped, norm


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    # float32 parameters pass through untouched; for others optax would keep the moments in their type
    def init(params):
        return inner.init(_cast(params))

    def update(updates, state, params=None):
        return inner.update(_cast(updates), state, _cast(params))

    return optax.GradientTransformation(init, update)


def _cast(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

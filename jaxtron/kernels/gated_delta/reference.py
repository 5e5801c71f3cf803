"""The gated delta rule as its definition says, position after position in float32: what the others are held to."""

import functools

import jax
import jax.numpy as jnp

from jaxtron.typing import Array, Bool, Float


def forward(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], Float[Array, "B 1 H N P"]]:
    """Outputs, the final state, and the initial one, of which the backward makes all others again."""
    o, final = _recurrence(q, k, v, g, beta, initial, resets)
    return o, final, initial[:, None]


def backward(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    states: Float[Array, "B 1 H N P"],
    do: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The recurrence, differentiated."""
    _, pull = jax.vjp(functools.partial(_recurrence, resets=resets), q, k, v, g, beta, states[:, 0])
    return pull((do, dfinal))


def final_state(
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """The recurrence, of which nobody reads anything but its end."""
    return _recurrence(k, k, v, g, beta, initial, resets)[1]


def gradient_summary(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    do: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """What is asked of the state before each position, the last position first."""

    def step(asked: Array, position: tuple[Array, ...]) -> tuple[Array, None]:
        q, k, left, beta, do = position
        asked = asked + q[..., None] * do[..., None, :]
        erased = (beta[..., None] * k)[..., None] * jnp.einsum("bhn,bhnp->bhp", k, asked)[..., None, :]
        return (asked - erased) * left[..., None, None], None

    by_position = _by_position(_by_head(q, g), _by_head(k, g), _left(g, resets), beta, do)
    return jax.lax.scan(step, dfinal, by_position, reverse=True)[0]


def _recurrence(
    q: Array, k: Array, v: Array, g: Array, beta: Array, initial: Array, resets: Array | None
) -> tuple[Array, Array]:
    """Outputs and the final state."""

    def step(state: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, left, beta = position
        state = state * left[..., None, None]
        written = beta[..., None] * (v - jnp.einsum("bhn,bhnp->bhp", k, state))
        state = state + k[..., None] * written[..., None, :]
        return state, jnp.einsum("bhn,bhnp->bhp", q, state)

    by_position = _by_position(_by_head(q, g), _by_head(k, g), v, _left(g, resets), beta)
    final, o = jax.lax.scan(step, initial, by_position)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final


def _left(g: Array, resets: Array | None) -> Array:
    """What is left at each position of the state before it [B, S, H]."""
    left = jnp.exp(g)
    return left if resets is None else jnp.where(resets[..., None], 0.0, left)


def _by_head(array: Array, g: Array) -> Array:
    """[B, S, G, N] as [B, S, H, N], in float32, in which gradients of a group's heads are then summed."""
    return jnp.repeat(array.astype(jnp.float32), g.shape[2] // array.shape[2], axis=2)


def _by_position(*arrays: Array) -> tuple[Array, ...]:
    """In float32, positions first."""
    return tuple(jnp.moveaxis(array.astype(jnp.float32), 1, 0) for array in arrays)

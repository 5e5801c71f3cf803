"""The selective scan as its definition says, position after position in float32: what the others are held to."""

import functools

import jax
import jax.numpy as jnp

from jaxtron.typing import Array, Bool, Float


def forward(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    C: Float[Array, "B S N"],
    D: Float[Array, " P"],
    initial: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Float[Array, "B S P"], Float[Array, "B N P"], Float[Array, "B 1 N P"]]:
    """y, the final state, and the initial one, of which the backward makes all others again."""
    y, final = _recurrence(x, dt, A, B, C, D, initial, resets)
    return y, final, initial[:, None]


def backward(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    C: Float[Array, "B S N"],
    D: Float[Array, " P"],
    states: Float[Array, "B 1 N P"],
    dy: Float[Array, "B S P"],
    dfinal: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """The recurrence, differentiated."""
    _, pull = jax.vjp(functools.partial(_recurrence, resets=resets), x, dt, A, B, C, D, states[:, 0])
    return pull((dy, dfinal))


def final_state(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    initial: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B N P"]:
    """The recurrence, of which nobody reads anything but its end."""
    return _recurrence(x, dt, A, B, B, jnp.zeros_like(A[:, 0]), initial, resets)[1]


def gradient_summary(
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    C: Float[Array, "B S N"],
    dy: Float[Array, "B S P"],
    dfinal: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B N P"]:
    """What is asked of the state before each position, the last position first."""

    def step(asked: Array, position: tuple[Array, ...]) -> tuple[Array, None]:
        dt, c, dy, kept = position
        return (asked + c[:, :, None] * dy[:, None]) * _left(dt, A, kept), None

    return jax.lax.scan(step, dfinal, _by_position(dt, C, dy, _kept(resets, dt)), reverse=True)[0]


def _recurrence(
    x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, initial: Array, resets: Array | None
) -> tuple[Array, Array]:
    """y and the final state."""

    def step(state: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        x, dt, b, c, kept = position
        state = state * _left(dt, A, kept) + b[:, :, None] * (dt * x)[:, None]
        return state, jnp.einsum("bn,bnp->bp", c, state)

    final, y = jax.lax.scan(step, initial, _by_position(x, dt, B, C, _kept(resets, dt)))
    return (jnp.moveaxis(y, 0, 1) + D.astype(jnp.float32) * x.astype(jnp.float32)).astype(x.dtype), final


def _left(dt: Array, A: Array, kept: Array) -> Array:
    """What is left at a position of the state before it [B, N, P]."""
    return jnp.exp(dt[:, None] * A.T) * kept[:, None, None]


def _kept(resets: Array | None, dt: Array) -> Array:
    """1, and 0 where the state is dropped [B, S]."""
    return jnp.ones_like(dt[:, :, 0]) if resets is None else 1.0 - resets


def _by_position(*arrays: Array) -> tuple[Array, ...]:
    """In float32, positions first."""
    return tuple(jnp.moveaxis(array.astype(jnp.float32), 1, 0) for array in arrays)

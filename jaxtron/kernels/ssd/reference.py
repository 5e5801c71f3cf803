"""State-space duality as its definition says, position after position in float32: what the others are held to."""

import functools

import jax
import jax.numpy as jnp

from jaxtron.kernels.ssd.spec import Operand
from jaxtron.typing import Array, Bool, Float


def unsupported_reason(x: Operand, B: Operand, device_kind: str) -> str | None:
    """None: it computes on any device, arrays of any size and type."""
    return None


def forward(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, " H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], Float[Array, "B 1 H N P"]]:
    """y, the final state, and the initial one, of which the backward makes all others again."""
    y, final = _recurrence(x, dt, A, B, C, D, initial, resets)
    return y, final, initial[:, None]


def backward(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, " H"],
    states: Float[Array, "B 1 H N P"],
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """The recurrence, differentiated."""
    _, pull = jax.vjp(functools.partial(_recurrence, resets=resets), x, dt, A, B, C, D, states[:, 0])
    return pull((dy, dfinal))


def final_state(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """The recurrence, of which nobody reads anything but its end."""
    return _recurrence(x, dt, A, B, B, jnp.zeros_like(A), initial, resets)[1]


def gradient_summary(
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    C: Float[Array, "B S G N"],
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """What is asked of the state before each position, the last position first."""

    def step(asked: Array, position: tuple[Array, ...]) -> tuple[Array, None]:
        left, c, dy = position
        asked = asked + jnp.einsum("bhn,bhp->bhnp", c, dy)
        return asked * left[..., None, None], None

    by_position = _by_position(_left(dt, A, resets), _by_head(C, dt), dy)
    return jax.lax.scan(step, dfinal, by_position, reverse=True)[0]


def _recurrence(
    x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, initial: Array, resets: Array | None
) -> tuple[Array, Array]:
    """y and the final state."""

    def step(state: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        left, added, b, c = position
        state = state * left[..., None, None] + jnp.einsum("bhn,bhp->bhnp", b, added)
        return state, jnp.einsum("bhn,bhnp->bhp", c, state)

    wide = x.astype(jnp.float32)
    by_position = _by_position(_left(dt, A, resets), wide * dt[..., None], _by_head(B, dt), _by_head(C, dt))
    final, y = jax.lax.scan(step, initial, by_position)
    return (jnp.moveaxis(y, 0, 1) + D.astype(jnp.float32)[:, None] * wide).astype(x.dtype), final


def _left(dt: Array, A: Array, resets: Array | None) -> Array:
    """What is left at each position of the state before it [B, S, H]."""
    left = jnp.exp(dt * A)
    return left if resets is None else jnp.where(resets[..., None], 0.0, left)


def _by_head(array: Array, dt: Array) -> Array:
    """[B, S, G, N] as [B, S, H, N]."""
    return jnp.repeat(array, dt.shape[2] // array.shape[2], axis=2)


def _by_position(*arrays: Array) -> tuple[Array, ...]:
    """In float32, positions first."""
    return tuple(jnp.moveaxis(array.astype(jnp.float32), 1, 0) for array in arrays)

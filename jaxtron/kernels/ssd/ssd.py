"""State-space duality's public functions, which layers call: forward and backward, and both for the state alone.

They are not differentiated themselves: who calls them has a derivative around all that it computes. A sequence in
pieces is `final_state` of each from nothing, the states that enter them by `through` (spec.py), then `forward`; and
likewise back, with `gradient_summary`.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from jaxtron.kernels.ssd.spec import Operand, check
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float, PyTree


@runtime_checkable
class StateSpaceDuality(Protocol):
    """One way to compute it; a module of this package is one.

    Sums, decays and states are float32.
    """

    def unsupported_reason(self, x: Operand, B: Operand, device_kind: str) -> str | None:
        """Why it cannot compute arrays of these shapes and types on devices of this kind (`jax.Device.device_kind`);
        none: it can."""
        ...

    def forward(
        self,
        x: Float[Array, "B S H P"],
        dt: Float[Array, "B S H"],
        A: Float[Array, " H"],
        B: Float[Array, "B S G N"],
        C: Float[Array, "B S G N"],
        D: Float[Array, " H"],
        initial: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], PyTree]:
        """As the function of this name."""
        ...

    def backward(
        self,
        x: Float[Array, "B S H P"],
        dt: Float[Array, "B S H"],
        A: Float[Array, " H"],
        B: Float[Array, "B S G N"],
        C: Float[Array, "B S G N"],
        D: Float[Array, " H"],
        states: PyTree,
        dy: Float[Array, "B S H P"],
        dfinal: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
        """As the function of this name."""
        ...

    def final_state(
        self,
        x: Float[Array, "B S H P"],
        dt: Float[Array, "B S H"],
        A: Float[Array, " H"],
        B: Float[Array, "B S G N"],
        initial: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> Float[Array, "B H N P"]:
        """As the function of this name."""
        ...

    def gradient_summary(
        self,
        dt: Float[Array, "B S H"],
        A: Float[Array, " H"],
        C: Float[Array, "B S G N"],
        dy: Float[Array, "B S H P"],
        dfinal: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> Float[Array, "B H N P"]:
        """As the function of this name."""
        ...


def forward(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, " H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: StateSpaceDuality,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], PyTree]:
    """y in the type of `x`, the state after the last position, and what the backward needs beside these arguments.

    That is arrays [B, chunks, heads, ...] whatever the implementation, to be sharded like `x`; heads are a multiple of
    H, in its order. `UserError` for sizes and types that do not fit.
    """
    check(x, dt, A, B, C, D=D, state=initial, resets=resets)
    return implementation.forward(*vary_alike((x, dt, A, B, C, D, initial.astype(jnp.float32), resets)))


def backward(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, " H"],
    states: PyTree,
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: StateSpaceDuality,
) -> tuple[
    Float[Array, "B S H P"],
    Float[Array, "B S H"],
    Float[Array, " H"],
    Float[Array, "B S G N"],
    Float[Array, "B S G N"],
    Float[Array, " H"],
    Float[Array, "B H N P"],
]:
    """Gradients of x, dt, A, B, C, D and the initial state, each in its type; `states` are `forward`'s.

    Inside a manual region they vary over every axis that an argument varies over: of A, D and what else is one for
    several devices they are a device's summand. `UserError` for sizes and types that do not fit.
    """
    check(x, dt, A, B, C, D=D, state=dfinal, resets=resets)
    given = (x, dt, A, B, C, D, states, dy.astype(x.dtype), dfinal.astype(jnp.float32), resets)
    return implementation.backward(*vary_alike(given))


def final_state(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: StateSpaceDuality,
) -> Float[Array, "B H N P"]:
    """The state after the last position alone: what a piece of a sequence adds to what comes after it.

    `UserError` for sizes and types that do not fit.
    """
    check(x, dt, A, B, B, state=initial, resets=resets)
    return implementation.final_state(*vary_alike((x, dt, A, B, initial.astype(jnp.float32), resets)))


def gradient_summary(
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    C: Float[Array, "B S G N"],
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: StateSpaceDuality,
) -> Float[Array, "B H N P"]:
    """The initial state's gradient alone: what a piece of a sequence asks of what comes before it.

    `UserError` for sizes and types that do not fit.
    """
    check(dy, dt, A, C, C, state=dfinal, resets=resets)
    return implementation.gradient_summary(*vary_alike((dt, A, C, dy, dfinal.astype(jnp.float32), resets)))

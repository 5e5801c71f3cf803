"""The selective scan's public functions, which layers call: forward and backward, and both for the state alone.

They are not differentiated themselves: who calls them has a derivative around all that it computes. A sequence in
pieces is `final_state` of each from nothing, the states that enter them by `through` (spec.py), then `forward`; and
likewise back, with `gradient_summary`.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from jaxtron.kernels.selective_scan.spec import check
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float


@runtime_checkable
class SelectiveScan(Protocol):
    """One way to compute it; a module of this package is one.

    Sums, decays and states are float32.
    """

    def forward(
        self,
        x: Float[Array, "B S P"],
        dt: Float[Array, "B S P"],
        A: Float[Array, "P N"],
        B: Float[Array, "B S N"],
        C: Float[Array, "B S N"],
        D: Float[Array, " P"],
        initial: Float[Array, "B N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> tuple[Float[Array, "B S P"], Float[Array, "B N P"], Float[Array, "B chunks N P"]]:
        """As the function of this name."""
        ...

    def backward(
        self,
        x: Float[Array, "B S P"],
        dt: Float[Array, "B S P"],
        A: Float[Array, "P N"],
        B: Float[Array, "B S N"],
        C: Float[Array, "B S N"],
        D: Float[Array, " P"],
        states: Float[Array, "B chunks N P"],
        dy: Float[Array, "B S P"],
        dfinal: Float[Array, "B N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
        """As the function of this name."""
        ...

    def final_state(
        self,
        x: Float[Array, "B S P"],
        dt: Float[Array, "B S P"],
        A: Float[Array, "P N"],
        B: Float[Array, "B S N"],
        initial: Float[Array, "B N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> Float[Array, "B N P"]:
        """As the function of this name."""
        ...

    def gradient_summary(
        self,
        dt: Float[Array, "B S P"],
        A: Float[Array, "P N"],
        C: Float[Array, "B S N"],
        dy: Float[Array, "B S P"],
        dfinal: Float[Array, "B N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> Float[Array, "B N P"]:
        """As the function of this name."""
        ...


def forward(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    C: Float[Array, "B S N"],
    D: Float[Array, " P"],
    initial: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: SelectiveScan,
) -> tuple[Float[Array, "B S P"], Float[Array, "B N P"], Float[Array, "B chunks N P"]]:
    """y in the type of `x`, the state after the last position, and the states that the backward starts from.

    `UserError` for sizes and types that do not fit.
    """
    check(x, dt, A, B, C, D=D, state=initial, resets=resets)
    return implementation.forward(*vary_alike((x, dt, A, B, C, D, initial.astype(jnp.float32), resets)))


def backward(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    C: Float[Array, "B S N"],
    D: Float[Array, " P"],
    states: Float[Array, "B chunks N P"],
    dy: Float[Array, "B S P"],
    dfinal: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: SelectiveScan,
) -> tuple[
    Float[Array, "B S P"],
    Float[Array, "B S P"],
    Float[Array, "P N"],
    Float[Array, "B S N"],
    Float[Array, "B S N"],
    Float[Array, " P"],
    Float[Array, "B N P"],
]:
    """Gradients of x, dt, A, B, C, D and the initial state, each in its type; `states` are `forward`'s.

    Inside a manual region they vary over every axis that an argument varies over: of A, D and what else is one for
    several devices they are a device's summand. `UserError` for sizes and types that do not fit.
    """
    check(x, dt, A, B, C, D=D, state=dfinal, resets=resets)
    given = (x, dt, A, B, C, D, states, dy.astype(x.dtype), dfinal.astype(jnp.float32), resets)
    return implementation.backward(*vary_alike(given))


def final_state(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    initial: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: SelectiveScan,
) -> Float[Array, "B N P"]:
    """The state after the last position alone: what a piece of a sequence adds to what comes after it.

    `UserError` for sizes and types that do not fit.
    """
    check(x, dt, A, B, B, state=initial, resets=resets)
    return implementation.final_state(*vary_alike((x, dt, A, B, initial.astype(jnp.float32), resets)))


def gradient_summary(
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    C: Float[Array, "B S N"],
    dy: Float[Array, "B S P"],
    dfinal: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: SelectiveScan,
) -> Float[Array, "B N P"]:
    """The initial state's gradient alone: what a piece of a sequence asks of what comes before it.

    `UserError` for sizes and types that do not fit.
    """
    check(dy, dt, A, C, C, state=dfinal, resets=resets)
    return implementation.gradient_summary(*vary_alike((dt, A, C, dy, dfinal.astype(jnp.float32), resets)))

"""The gated delta rule's public functions, which layers call: forward and backward, and both for the state alone.

They are not differentiated themselves: who calls them has a derivative around all that it computes. A sequence in
pieces is `final_state` of each from nothing, the states that enter them by `through`, then `forward`; and likewise
back, with `gradient_summary`.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from jaxtron.kernels.gated_delta.spec import check
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float


@runtime_checkable
class GatedDeltaRule(Protocol):
    """One way to compute it; a module of this package is one.

    Sums, decays and states are float32.
    """

    def forward(
        self,
        q: Float[Array, "B S G N"],
        k: Float[Array, "B S G N"],
        v: Float[Array, "B S H P"],
        g: Float[Array, "B S H"],
        beta: Float[Array, "B S H"],
        initial: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], Float[Array, "B chunks H N P"]]:
        """As the function of this name."""
        ...

    def backward(
        self,
        q: Float[Array, "B S G N"],
        k: Float[Array, "B S G N"],
        v: Float[Array, "B S H P"],
        g: Float[Array, "B S H"],
        beta: Float[Array, "B S H"],
        states: Float[Array, "B chunks H N P"],
        do: Float[Array, "B S H P"],
        dfinal: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> tuple[Array, Array, Array, Array, Array, Array]:
        """As the function of this name."""
        ...

    def final_state(
        self,
        k: Float[Array, "B S G N"],
        v: Float[Array, "B S H P"],
        g: Float[Array, "B S H"],
        beta: Float[Array, "B S H"],
        initial: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> Float[Array, "B H N P"]:
        """As the function of this name."""
        ...

    def gradient_summary(
        self,
        q: Float[Array, "B S G N"],
        k: Float[Array, "B S G N"],
        g: Float[Array, "B S H"],
        beta: Float[Array, "B S H"],
        do: Float[Array, "B S H P"],
        dfinal: Float[Array, "B H N P"],
        resets: Bool[Array, "B S"] | None,
        /,
    ) -> Float[Array, "B H N P"]:
        """As the function of this name."""
        ...


def forward(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: GatedDeltaRule,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], Float[Array, "B chunks H N P"]]:
    """Outputs in the type of `v`, the state after the last position, and the states that the backward starts from.

    `UserError` for sizes and types that do not fit.
    """
    check(k, v, g, beta, q=q, state=initial, resets=resets)
    return implementation.forward(*vary_alike((q, k, v, g, beta, initial.astype(jnp.float32), resets)))


def backward(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    states: Float[Array, "B chunks H N P"],
    do: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: GatedDeltaRule,
) -> tuple[
    Float[Array, "B S G N"],
    Float[Array, "B S G N"],
    Float[Array, "B S H P"],
    Float[Array, "B S H"],
    Float[Array, "B S H"],
    Float[Array, "B H N P"],
]:
    """Gradients of q, k, v, g, beta and the initial state, each in its type; `states` are `forward`'s.

    `UserError` for sizes and types that do not fit.
    """
    check(k, v, g, beta, q=q, state=dfinal, resets=resets)
    given = (q, k, v, g, beta, states, do.astype(v.dtype), dfinal.astype(jnp.float32), resets)
    return implementation.backward(*vary_alike(given))


def final_state(
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: GatedDeltaRule,
) -> Float[Array, "B H N P"]:
    """The state after the last position alone: what a piece of a sequence adds to what comes after it.

    `UserError` for sizes and types that do not fit.
    """
    check(k, v, g, beta, state=initial, resets=resets)
    return implementation.final_state(*vary_alike((k, v, g, beta, initial.astype(jnp.float32), resets)))


def through(
    k: Float[Array, "B S G N"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    resets: Bool[Array, "B S"] | None,
    implementation: GatedDeltaRule,
) -> Float[Array, "B H N M"]:
    """The matrix by which the state that enters is multiplied at the end (M = N): what becomes of the identity, where
    nothing is written.

    `UserError` for sizes and types that do not fit.
    """
    (rows, length, heads), size = g.shape, k.shape[3]
    identity = jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), (rows, heads, size, size))
    return final_state(k, jnp.zeros((rows, length, heads, size), k.dtype), g, beta, identity, resets, implementation)


def gradient_summary(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    do: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    implementation: GatedDeltaRule,
) -> Float[Array, "B H N P"]:
    """The initial state's gradient alone: what a piece of a sequence asks of what comes before it.

    `UserError` for sizes and types that do not fit.
    """
    check(k, do, g, beta, q=q, state=dfinal, resets=resets)
    return implementation.gradient_summary(*vary_alike((q, k, g, beta, do, dfinal.astype(jnp.float32), resets)))

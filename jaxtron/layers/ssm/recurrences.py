"""The recurrences of state-space layers as `scan.py` runs them: arrays by the names of their axes, and functions."""

import functools
from typing import Any

import jax.numpy as jnp

from jaxtron.kernels.gated_delta import gated_delta
from jaxtron.kernels.gated_delta.gated_delta import GatedDeltaRule
from jaxtron.kernels.selective_scan import selective_scan as selective
from jaxtron.kernels.selective_scan import spec as selective_spec
from jaxtron.kernels.selective_scan.selective_scan import SelectiveScan
from jaxtron.kernels.ssd import spec as ssd_spec
from jaxtron.kernels.ssd import ssd
from jaxtron.kernels.ssd.ssd import StateSpaceDuality
from jaxtron.layers.ssm.scan import Recurrence
from jaxtron.typing import Array

ALONG = ("batch", "full_seq")
HEADS = (*ALONG, "heads", "head_dim")
STEPS = (*ALONG, "heads")
GROUPS = (*ALONG, "groups", "state")
CHANNELS = (*ALONG, "channels")


@functools.cache
def duality(implementation: StateSpaceDuality) -> Recurrence:
    """State-space duality (2405.21060) of x, dt, A, B, C and D: a head decays at one rate."""

    def gradient_summary(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, *given: Any) -> Array:
        return ssd.gradient_summary(dt, A, C, *given, implementation=implementation)

    return Recurrence(
        arrays=(HEADS, STEPS, ("heads",), GROUPS, GROUPS, ("heads",)),
        output=HEADS,
        state=("batch", "heads", "state", "head_dim"),
        kept=("batch", None, "heads"),
        shape=lambda x, dt, A, B, C, D: (x.shape[0], x.shape[2], B.shape[3], x.shape[3]),
        forward=functools.partial(ssd.forward, implementation=implementation),
        backward=functools.partial(ssd.backward, implementation=implementation),
        final_state=lambda x, dt, A, B, C, D, *given: ssd.final_state(
            x, dt, A, B, *given, implementation=implementation
        ),
        gradient_summary=gradient_summary,
        through=lambda x, dt, A, B, C, D, resets: ssd_spec.through(dt, A, resets),
        carry=lambda left, state, reverse: left[..., None, None] * state,
    )


@functools.cache
def selective_scan(implementation: SelectiveScan) -> Recurrence:
    """The selective scan (2312.00752) of x, dt, A, B, C and D: each number of a channel's state decays at its own rate.

    B and C are one group, which all channels read.
    """

    def bare(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array) -> tuple[Array, ...]:
        return x, dt, A, B[:, :, 0], C[:, :, 0], D

    def backward(*given: Any) -> tuple[Array, ...]:
        dx, ddt, dA, dB, dC, *others = selective.backward(*bare(*given[:6]), *given[6:], implementation=implementation)
        return dx, ddt, dA, dB[:, :, None], dC[:, :, None], *others

    def final_state(*given: Any) -> Array:
        return selective.final_state(*bare(*given[:6])[:4], *given[6:], implementation=implementation)

    def gradient_summary(*given: Any) -> Array:
        _, dt, A, _, C, _ = bare(*given[:6])
        return selective.gradient_summary(dt, A, C, *given[6:], implementation=implementation)

    return Recurrence(
        arrays=(CHANNELS, CHANNELS, ("channels", "state"), GROUPS, GROUPS, ("channels",)),
        output=CHANNELS,
        state=("batch", "state", "channels"),
        kept=("batch", None, "state", "channels"),
        shape=lambda x, dt, A, B, C, D: (x.shape[0], A.shape[1], A.shape[0]),
        forward=lambda *given: selective.forward(*bare(*given[:6]), *given[6:], implementation=implementation),
        backward=backward,
        final_state=final_state,
        gradient_summary=gradient_summary,
        through=lambda x, dt, A, B, C, D, resets: selective_spec.through(dt, A, resets),
        carry=lambda left, state, reverse: left * state,
    )


@functools.cache
def delta_rule(implementation: GatedDeltaRule) -> Recurrence:
    """The gated delta rule (2412.06464) of q, k, v, g and beta: what a piece does to a state is a matrix."""

    def through(q: Array, k: Array, v: Array, g: Array, beta: Array, resets: Array | None) -> Array:
        return gated_delta.through(k, g, beta, resets, implementation)

    def gradient_summary(q: Array, k: Array, v: Array, g: Array, beta: Array, *given: Any) -> Array:
        return gated_delta.gradient_summary(q, k, g, beta, *given, implementation=implementation)

    def carry(matrix: Array, state: Array, reverse: bool) -> Array:
        return jnp.einsum("bhmn,bhmp->bhnp" if reverse else "bhnm,bhmp->bhnp", matrix, state)

    return Recurrence(
        arrays=(GROUPS, GROUPS, HEADS, STEPS, STEPS),
        output=HEADS,
        state=("batch", "heads", "state", "head_dim"),
        kept=("batch", None, "heads"),
        shape=lambda q, k, v, g, beta: (v.shape[0], v.shape[2], k.shape[3], v.shape[3]),
        forward=functools.partial(gated_delta.forward, implementation=implementation),
        backward=functools.partial(gated_delta.backward, implementation=implementation),
        final_state=lambda q, *given: gated_delta.final_state(*given, implementation=implementation),
        gradient_summary=gradient_summary,
        through=through,
        carry=carry,
    )

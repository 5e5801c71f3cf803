"""The recurrences of state-space layers as `scan.py` runs them: arrays by the names of their axes, and functions."""

import functools

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

    def gradient_summary(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, *given: Array) -> Array:
        return ssd.gradient_summary(dt, A, C, *given, implementation)

    return Recurrence(
        arrays=(HEADS, STEPS, ("heads",), GROUPS, GROUPS, ("heads",)),
        output=HEADS,
        state=("batch", "heads", "state", "head_dim"),
        kept=("batch", None, "heads"),
        shape=lambda x, dt, A, B, C, D: (x.shape[0], x.shape[2], B.shape[3], x.shape[3]),
        forward=lambda *given: ssd.forward(*given, implementation),
        backward=lambda *given: ssd.backward(*given, implementation),
        final_state=lambda x, dt, A, B, C, D, *given: ssd.final_state(x, dt, A, B, *given, implementation),
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

    def backward(*given: Array) -> tuple[Array, ...]:
        dx, ddt, dA, dB, dC, *others = selective.backward(*bare(*given[:6]), *given[6:], implementation)
        return dx, ddt, dA, dB[:, :, None], dC[:, :, None], *others

    def final_state(*given: Array) -> Array:
        return selective.final_state(*bare(*given[:6])[:4], *given[6:], implementation)

    def gradient_summary(*given: Array) -> Array:
        _, dt, A, _, C, _ = bare(*given[:6])
        return selective.gradient_summary(dt, A, C, *given[6:], implementation)

    return Recurrence(
        arrays=(CHANNELS, CHANNELS, ("channels", "state"), GROUPS, GROUPS, ("channels",)),
        output=CHANNELS,
        state=("batch", "state", "channels"),
        kept=("batch", None, "state", "channels"),
        shape=lambda x, dt, A, B, C, D: (x.shape[0], A.shape[1], A.shape[0]),
        forward=lambda *given: selective.forward(*bare(*given[:6]), *given[6:], implementation),
        backward=backward,
        final_state=final_state,
        gradient_summary=gradient_summary,
        through=lambda x, dt, A, B, C, D, resets: selective_spec.through(dt, A, resets),
        carry=lambda left, state, reverse: left * state,
    )

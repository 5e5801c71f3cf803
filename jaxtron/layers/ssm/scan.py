"""The state of every head along a sequence, wherever its parts lie: one derivative around any implementation's pair.

What a piece of a sequence does to a state is `through * state + added`. Devices along `mesh.context` tell each other
these two of each piece, which are small, and then each starts its pieces from the states that enter them; the
derivative does the same from the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.kernels.ssd import ssd
from jaxtron.kernels.ssd.spec import through
from jaxtron.kernels.ssd.ssd import StateSpaceDuality
from jaxtron.kernels.varying import vary_alike
from jaxtron.layers.saved import save_for_backward
from jaxtron.layers.ssm.documents import resets
from jaxtron.sharding.context import entering, pieces, whole
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current, spec
from jaxtron.typing import Array, Float, Int

HEADS = ("batch", "full_seq", "heads", "head_dim")
STEPS = HEADS[:3]
# of states that the backward keeps, and of one
KEPT, STATE = ("batch", None, "heads"), ("batch", "heads")
GROUPS = ("batch", "full_seq", "groups", "state")


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def scan(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, "H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, "H"],
    segments: Int[Array, "B S"] | None,
    implementation: StateSpaceDuality,
) -> Float[Array, "B S H P"]:
    """State-space duality (2405.21060): y_t = C_t h_t + D x_t, h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, from h = 0.

    A document starts from nothing. Groups that are fewer than tensor parts are on every device.
    """
    return _forward(x, dt, A, B, C, D, segments, implementation)[0]


def _specs(num_groups: int, has_segments: bool) -> tuple[PartitionSpec | None, ...]:
    groups = spec(*GROUPS) if current().splits("groups", num_groups) else spec("batch", "full_seq", None, None)
    segments = spec("batch", "full_seq") if has_segments else None
    return spec(*HEADS), spec(*STEPS), spec("heads"), groups, groups, spec("heads"), segments


def _forward(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    segments: Array | None,
    implementation: StateSpaceDuality,
) -> tuple[Array, tuple[Array | None, ...]]:
    is_split = current().splits("groups", B.shape[2])

    def local(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, segments: Array | None) -> tuple:
        B, C = (_read(array, is_split) for array in (B, C))
        starts, (x, dt, B, C) = resets(segments), map(pieces, (x, dt, B, C))
        initial = nothing = _nothing(x, B)
        if current().parts("context") > 1:
            added = ssd.final_state(x, dt, A, B, nothing, starts, implementation)
            initial = entering(through(dt, A, starts), added)
        y, _, states = ssd.forward(x, dt, A, B, C, D, initial, starts, implementation)
        return whole(y), states

    specs = _specs(B.shape[2], segments is not None)
    run = on_each_device(local, specs, (specs[0], spec(*KEPT)))
    y, states = run(x, dt, A, B, C, D, segments)
    return save_for_backward(y), (x, dt, A, B, C, D, segments, save_for_backward(states))


def _backward(implementation: StateSpaceDuality, kept: tuple[Array | None, ...], dy: Array) -> tuple[Array | None, ...]:
    groups, segments = kept[3], kept[6]
    assert groups is not None
    num_groups = groups.shape[2]
    is_split = current().splits("groups", num_groups)

    def local(
        x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, segments: Array | None, states: Array, dy: Array
    ) -> tuple[Array, ...]:
        B, C = (_read(array, is_split) for array in (B, C))
        starts, (x, dt, B, C, dy) = resets(segments), map(pieces, (x, dt, B, C, dy))
        dfinal = nothing = _nothing(x, B)
        if current().parts("context") > 1:
            asked = ssd.gradient_summary(dt, A, C, dy, nothing, starts, implementation)
            dfinal = entering(through(dt, A, starts), asked, reverse=True)
        given = (x, dt, A, B, C, D, states, dy, dfinal, starts)
        dx, ddt, dA, dB, dC, dD, _ = ssd.backward(*given, implementation)
        dB, dC = (_summed(whole(array), num_groups, is_split) for array in (dB, dC))
        return whole(dx), whole(ddt), dA, dB, dC, dD

    specs = _specs(num_groups, segments is not None)
    run = on_each_device(local, (*specs, spec(*KEPT), specs[0]), specs[:6])
    return *run(*kept, dy), None


scan.defvjp(_forward, _backward)


def advance(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, "H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, "H"],
    state: Float[Array, "B H N P"],
    implementation: StateSpaceDuality,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"]]:
    """As `scan`, from a state and with the one after the last position; not differentiated, sequences are whole."""
    is_split = current().splits("groups", B.shape[2])

    def local(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, state: Array) -> tuple[Array, Array]:
        B, C = (_read(array, is_split) for array in (B, C))
        return ssd.forward(x, dt, A, B, C, D, state, None, implementation)[:2]

    specs = _specs(B.shape[2], has_segments=False)
    run = on_each_device(local, (*specs[:6], spec(*STATE)), (specs[0], spec(*STATE)))
    return run(x, dt, A, B, C, D, state)


def _nothing(x: Array, B: Array) -> Float[Array, "B H N P"]:
    """The state before anything, which varies over devices as `x` does."""
    shape = (x.shape[0], x.shape[2], B.shape[3], x.shape[3])
    return vary_alike((jnp.zeros(shape, jnp.float32), x))[0]


def _own_group(num_groups: int) -> Array:
    """The one that this device's heads read, where groups are fewer than tensor parts."""
    rules = current()
    return jax.lax.axis_index(rules.axes("tensor")) * num_groups // rules.parts("tensor")


def _read(array: Array, is_split: bool) -> Array:
    """Groups that a device's heads read."""
    return array if is_split else jax.lax.dynamic_slice_in_dim(array, _own_group(array.shape[2]), 1, 2)


def _summed(gradient: Array, num_groups: int, is_split: bool) -> Array:
    """The transpose of `_read`: of all groups, from the heads of all devices."""
    if is_split:
        return gradient
    wide = gradient.astype(jnp.float32)
    number = jnp.arange(num_groups)[:, None]
    placed = jnp.where(number == _own_group(num_groups), wide, 0.0)
    return jax.lax.psum(placed, current().axes("tensor")).astype(gradient.dtype)

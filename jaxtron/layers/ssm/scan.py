"""A state along a sequence, wherever the sequence's parts lie: one derivative around any kind of recurrence.

What a piece of a sequence does to a state is linear: what is left of the one that entered, and a summand. Devices along
`mesh.context` tell each other these two of each piece, which are small, and then each starts its pieces from the states
that enter them; the derivative does the same from the end.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.kernels.varying import vary_alike
from jaxtron.layers.saved import save_for_backward
from jaxtron.layers.ssm.documents import resets
from jaxtron.sharding.context import entering, pieces, whole
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current, spec
from jaxtron.typing import Array, Float, Int, PyTree

Names = tuple[str | None, ...]
Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Recurrence:
    """A kind of state with an implementation of it (`recurrences.py`); functions take all its arrays, in their order.

    An array's names of axes say whether it goes along the sequence (the second is `full_seq`) and whether groups of
    heads share it (the third is `groups`).
    """

    arrays: tuple[Names, ...]
    output: Names
    state: Names
    kept: Names
    """Of the states that the backward keeps, rows first."""
    shape: Callable[..., tuple[int, ...]]
    """(*arrays) -> shape of a state."""
    forward: Callable[..., tuple[Array, Array, PyTree]]
    """(*arrays, initial state, resets) -> output, final state, states to keep."""
    backward: Callable[..., tuple[Array, ...]]
    """(*arrays, states, gradients of output and final state, resets) -> those of the arrays and the initial state."""
    final_state: Callable[..., Array]
    """(*arrays, initial state, resets) -> final state."""
    gradient_summary: Callable[..., Array]
    """(*arrays, gradients of output and final state, resets) -> that of the initial state."""
    through: Callable[..., Array]
    """(*arrays, resets) -> what is left at the end of the state that entered."""
    carry: Callable[[Array, Array, bool], Array]
    """(that, state, whether it is a gradient and goes from the end to the start) -> what is left of it."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    recurrence: Recurrence, arrays: tuple[Float[Array, "..."], ...], segments: Int[Array, "B S"] | None
) -> Float[Array, "B S ..."]:
    """The output of a recurrence that starts from nothing; so does each document.

    Groups that are fewer than tensor parts are on every device.
    """
    return _forward(recurrence, arrays, segments)[0]


def _specs(recurrence: Recurrence, arrays: Arrays) -> tuple[PartitionSpec, ...]:
    found = []
    for names, array in zip(recurrence.arrays, arrays, strict=True):
        is_whole = _is_shared(names) and not _is_split(array)
        found.append(spec(*(None if is_whole and name == "groups" else name for name in names)))
    return tuple(found)


def _is_shared(names: Names) -> bool:
    return names[2:3] == ("groups",)


def _is_split(array: Array) -> bool:
    """Whether tensor parts have whole groups."""
    return current().splits("groups", array.shape[2])


def _forward(
    recurrence: Recurrence, arrays: Arrays, segments: Array | None
) -> tuple[Array, tuple[Arrays, Array | None, PyTree]]:
    counts = _groups(recurrence, arrays)

    def local(arrays: Arrays, segments: Array | None) -> tuple[Array, PyTree]:
        starts, given = resets(segments), _own(recurrence, arrays, counts)
        initial = nothing = _nothing(recurrence, given)
        if current().parts("context") > 1:
            added = recurrence.final_state(*given, nothing, starts)
            initial = entering(recurrence.through(*given, starts), added, recurrence.carry)
        y, _, states = recurrence.forward(*given, initial, starts)
        return whole(y), states

    output, kept = spec(*recurrence.output), spec(*recurrence.kept)
    run = on_each_device(local, (_specs(recurrence, arrays), _by_position(segments)), (output, kept))
    y, states = run(arrays, segments)
    return save_for_backward(y), (arrays, segments, save_for_backward(states))


def _backward(recurrence: Recurrence, saved: tuple[Arrays, Array | None, PyTree], dy: Array) -> tuple[Arrays, None]:
    arrays, segments, _ = saved
    counts, specs = _groups(recurrence, arrays), _specs(recurrence, arrays)

    def local(arrays: Arrays, segments: Array | None, states: PyTree, dy: Array) -> Arrays:
        starts, given, dy = resets(segments), _own(recurrence, arrays, counts), pieces(dy)
        dfinal = nothing = _nothing(recurrence, given)
        if current().parts("context") > 1:
            asked = recurrence.gradient_summary(*given, dy, nothing, starts)
            dfinal = entering(recurrence.through(*given, starts), asked, recurrence.carry, reverse=True)
        *gradients, _ = recurrence.backward(*given, states, dy, dfinal, starts)
        return tuple(
            _summed(whole(gradient) if _is_along(names) else gradient, count)
            for names, count, gradient in zip(recurrence.arrays, counts, gradients, strict=True)
        )

    given = (specs, _by_position(segments), spec(*recurrence.kept), spec(*recurrence.output))
    return on_each_device(local, given, specs)(*saved, dy), None


scan.defvjp(_forward, _backward)


def advance(
    recurrence: Recurrence, arrays: tuple[Float[Array, "..."], ...], state: Float[Array, "B ..."]
) -> tuple[Float[Array, "B S ..."], Float[Array, "B ..."]]:
    """As `scan`, from a state and with the one after the last position; not differentiated, sequences are whole."""
    counts = _groups(recurrence, arrays)

    def local(arrays: Arrays, state: Array) -> tuple[Array, Array]:
        return recurrence.forward(*_own(recurrence, arrays, counts), state, None)[:2]

    layout = spec(*recurrence.state)
    run = on_each_device(local, (_specs(recurrence, arrays), layout), (spec(*recurrence.output), layout))
    return run(arrays, state)


def _is_along(names: Names) -> bool:
    return names[1:2] == ("full_seq",)


def _by_position(segments: Array | None) -> PartitionSpec | None:
    return None if segments is None else spec("batch", "full_seq")


def _groups(recurrence: Recurrence, arrays: Arrays) -> tuple[int | None, ...]:
    """Of each array how many groups share it, where they are on every device (none: a device has its own)."""
    return tuple(
        array.shape[2] if _is_shared(names) and not _is_split(array) else None
        for names, array in zip(recurrence.arrays, arrays, strict=True)
    )


def _own(recurrence: Recurrence, arrays: Arrays, counts: tuple[int | None, ...]) -> Arrays:
    """What a device reads of the arrays, its pieces of a sequence as rows."""
    found = []
    for names, count, array in zip(recurrence.arrays, counts, arrays, strict=True):
        if count is not None:
            array = jax.lax.dynamic_slice_in_dim(array, _own_group(count), 1, 2)
        found.append(pieces(array) if _is_along(names) else array)
    return tuple(found)


def _nothing(recurrence: Recurrence, arrays: Arrays) -> Array:
    """The state before anything, which varies over devices as the first array does."""
    return vary_alike((jnp.zeros(recurrence.shape(*arrays), jnp.float32), arrays[0]))[0]


def _own_group(num_groups: int) -> Array:
    """The one that this device's heads read, where groups are fewer than tensor parts."""
    rules = current()
    return jax.lax.axis_index(rules.axes("tensor")) * num_groups // rules.parts("tensor")


def _summed(gradient: Array, count: int | None) -> Array:
    """Of what groups share on every device: of all groups, from the heads of all devices."""
    if count is None:
        return gradient
    wide = gradient.astype(jnp.float32)
    placed = jnp.where(jnp.arange(count)[:, None] == _own_group(count), wide, 0.0)
    return jax.lax.psum(placed, current().axes("tensor")).astype(gradient.dtype)

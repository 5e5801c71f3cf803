"""Buffers: trees of arrays with leading axes of slots, read and written at indices of these.

Indices are within bounds and not negative: clamped ones are others to XLA, which then copies out what is added to in
place, and does not see that a loop's own counter is where a copy begins.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from jaxtron.sharding.collectives import empty_like_type, vary, zeros_like_type
from jaxtron.typing import Array, PyTree


def zeros(like: PyTree, *leading: int) -> PyTree:
    """Zeros of the types in `like` with these leading axes."""
    return jax.tree.map(lambda leaf: zeros_like_type(leaf, leading), like)


def empty(like: PyTree, *leading: int) -> PyTree:
    """As `zeros` with anything in it, for what is written before it is read: nothing fills its memory."""
    return jax.tree.map(lambda leaf: empty_like_type(leaf, leading), like)


def read(buffer: PyTree, *indices: Array | int) -> PyTree:
    """The buffer's arrays at those indices of their leading axes, each sharded as the rest of it is."""
    count = len(indices)

    def read_array(array: Array) -> Array:
        spec = PartitionSpec(*jax.typeof(array).sharding.spec[count:])
        found = _slice(array, indices)
        found = jax.lax.squeeze(found, range(count))
        # of a single element JAX 0.11 forgets how it lies
        if found.size == 1 and jax.typeof(found).sharding.spec != spec:
            found = jax.lax.reshape(found, found.shape, out_sharding=spec)
        return found

    return jax.tree.map(read_array, buffer)


def write(buffer: PyTree, values: PyTree, *indices: Array | int) -> PyTree:
    """The buffer with `values` at those indices of the leading axes."""

    def write_array(array: Array, value: Array) -> Array:
        return _update(array, value[(None,) * len(indices)], indices)

    return jax.tree.map(write_array, buffer, values)


def in_order(arrays: PyTree) -> PyTree:
    """The arrays with their last axis the innermost in memory, as buffers are.

    Else XLA may give what is read the order that its reader likes, and then the whole buffer, copied at every tick.
    """

    def pin(array: Array) -> Array:
        return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))

    return jax.tree.map(pin, arrays)


def add_at(totals: PyTree, parts: PyTree, index: Array | int) -> PyTree:
    """`totals` with `parts` added at one index of their leading axis, in the totals' types."""

    def add_array(total: Array, part: Array) -> Array:
        return _update(total, _slice(total, (index,)) + part.astype(total.dtype)[None], (index,))

    return jax.tree.map(add_array, totals, parts)


def _slice(array: Array, indices: Sequence[Array | int]) -> Array:
    sizes = (*(1,) * len(indices), *array.shape[len(indices) :])
    return jax.lax.dynamic_slice(array, _start(indices, array.ndim), sizes, allow_negative_indices=False)


def _update(array: Array, value: Array, indices: Sequence[Array | int]) -> Array:
    return jax.lax.dynamic_update_slice(array, value, _start(indices, array.ndim), allow_negative_indices=False)


def _start(indices: Sequence[Array | int], rank: int) -> list[Array]:
    return [jnp.asarray(index, jnp.int32) for index in (*indices, *(0,) * (rank - len(indices)))]


def add(totals: PyTree, parts: PyTree) -> PyTree:
    """The sums, in the totals' types."""
    return jax.tree.map(lambda total, part: total + vary(part).astype(total.dtype), totals, parts)


def add_in_branch(totals: PyTree, parts: PyTree) -> PyTree:
    """As `add` for totals that other branches pass on as they are.

    A plain sum is another array to XLA, so that every tick without one copied the embedding's; what a loop writes into
    stays where it is.
    """

    def add_array(total: Array, part: Array) -> Array:
        part = vary(part)
        if total.ndim < 2 or total.shape[-1] % 2:
            return total + part.astype(total.dtype)
        size = total.shape[-1] // 2

        def add_half(half: Array, total: Array) -> Array:
            axis, start = total.ndim - 1, half * size
            old, new = (jax.lax.dynamic_slice_in_dim(array, start, size, axis) for array in (total, part))
            return jax.lax.dynamic_update_slice_in_dim(total, old + new.astype(total.dtype), start, axis)

        return jax.lax.fori_loop(0, 2, add_half, total)

    return jax.tree.map(add_array, totals, parts)

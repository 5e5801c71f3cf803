"""Buffers: trees of arrays with leading axes of slots, read and written at indices of these."""

import jax
from jax.sharding import PartitionSpec

from jaxtron.sharding.collectives import vary, zeros_like_type
from jaxtron.typing import Array, PyTree


def zeros(like: PyTree, *leading: int) -> PyTree:
    """Zeros of the types in `like` with these leading axes."""
    return jax.tree.map(lambda leaf: zeros_like_type(leaf, leading), like)


def read(buffer: PyTree, *indices: Array | int) -> PyTree:
    """The buffer's arrays at those indices of their leading axes, each sharded as the rest of it is."""

    def read_array(array: Array) -> Array:
        for index in indices:
            spec = PartitionSpec(*jax.typeof(array).sharding.spec[1:])
            array = jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
            # of a single element JAX 0.11 forgets how it lies
            if array.size == 1 and jax.typeof(array).sharding.spec != spec:
                array = jax.lax.reshape(array, array.shape, out_sharding=spec)
        return array

    return jax.tree.map(read_array, buffer)


def write(buffer: PyTree, values: PyTree, *indices: Array | int) -> PyTree:
    """The buffer with `values` at those indices of the leading axes."""

    def write_array(array: Array, value: Array) -> Array:
        start = (*indices, *(0,) * value.ndim)
        return jax.lax.dynamic_update_slice(array, value[(None,) * len(indices)], start)

    return jax.tree.map(write_array, buffer, values)


def add_at(totals: PyTree, parts: PyTree, index: Array | int) -> PyTree:
    """`totals` with `parts` added at one index of their leading axis, in the totals' types."""

    def add_array(total: Array, part: Array) -> Array:
        return write(total, read(total, index) + part.astype(total.dtype), index)

    return jax.tree.map(add_array, totals, parts)


def add(totals: PyTree, parts: PyTree) -> PyTree:
    """The sums, in the totals' types."""
    return jax.tree.map(lambda total, part: total + vary(part).astype(total.dtype), totals, parts)


def add_in_branch(totals: PyTree, parts: PyTree) -> PyTree:
    """As `add` for totals that other branches pass on as they are.

    A plain sum is another array to XLA, so that every tick without one copied the embedding's; what a loop writes into
    stays where it is.
    """

    def add_array(total: Array, part: Array) -> Array:
        part = vary(part).astype(total.dtype)
        if total.ndim < 2 or total.shape[-1] % 2:
            return total + part
        size = total.shape[-1] // 2

        def add_half(half: Array, total: Array) -> Array:
            axis, start = total.ndim - 1, half * size
            old, new = (jax.lax.dynamic_slice_in_dim(array, start, size, axis) for array in (total, part))
            return jax.lax.dynamic_update_slice_in_dim(total, old + new, start, axis)

        return jax.lax.fori_loop(0, 2, add_half, total)

    return jax.tree.map(add_array, totals, parts)

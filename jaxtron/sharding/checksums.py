"""Checksums of arrays by device, each of what lies there and computed there."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.sharding.collectives import vary
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, PyTree, UInt32

# odd, so that no two numbers become one: 2**32 over the golden ratio
FACTOR = 0x9E3779B1


def checksum(array: Array) -> UInt32[Array, ""]:
    """Of the bits of a local array: where one number is another, so is this, and once in 2**32 not where more are.

    A sum of integers, which is the same in any order.
    """
    words = _words(array).reshape(-1) * jnp.uint32(FACTOR)
    words ^= words >> 16
    return _weighted(words)


def by_device(tree: PyTree) -> UInt32[Array, "D N"]:
    """Of each leaf, what every device has of it: a row for each of `mesh.devices.flat`, the whole on every process.

    Of global arrays, inside jit and `sharding.use(rules)`; nothing of them is sent.
    """
    leaves = [_plain(leaf) for leaf in jax.tree.leaves(tree)]

    def local(*parts: Array) -> UInt32[Array, "1 N"]:
        return vary(jnp.stack([checksum(part) for part in parts]))[None]

    specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
    sums = on_each_device(local, specs, PartitionSpec(current().mesh.axis_names))(*leaves)
    return jax.sharding.reshard(sums, PartitionSpec())


def inside_region(trees: Sequence[PyTree]) -> UInt32[Array, "1 P N"]:
    """The same inside `region`, one checksum a tree: of the parts along tensor, for the region to stack."""
    leaves = [[_plain(vary(leaf)) for leaf in jax.tree.leaves(tree)] for tree in trees]

    def local(parts: list[list[Array]]) -> UInt32[Array, "1 1 N"]:
        sums = [_weighted(jnp.stack([checksum(part) for part in tree])) for tree in parts]
        return vary(jnp.stack(sums))[None, None]

    specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, leaves)
    return on_each_device(local, (specs,), PartitionSpec(None, current().axes("tensor")))(leaves)


def device_rows(sums: UInt32[Array, "M P N"]) -> UInt32[Array, "D N"]:
    """What a region stacked of `inside_region`, in the order of `by_device` and on every process."""
    mesh, rules = current().mesh, current()
    names = [*rules.manual, *rules.axes("tensor")]
    whole = jax.sharding.reshard(sums, PartitionSpec())
    split = whole.reshape(*(mesh.shape[name] for name in names), sums.shape[-1])
    order = [names.index(name) for name in mesh.axis_names]
    return split.transpose(*order, len(names)).reshape(mesh.size, sums.shape[-1])


def _weighted(words: UInt32[Array, "N"]) -> UInt32[Array, ""]:
    """Their sum with odd weights, by place: an odd factor loses no bit."""
    places = jax.lax.iota(jnp.uint32, words.size)
    return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)


def _plain(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _words(array: Array) -> UInt32[Array, "..."]:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)

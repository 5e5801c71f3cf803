"""A state's layers in the model's order, as checkpoints have them whatever pipeline wrote them.

With several stages the rows of stacked arrays lie in the stages' order, some of them empty. An array at a time is
split along another dimension instead, so that every device has all rows of its part and reorders them by itself.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from jaxtron.checkpoint.names import parts
from jaxtron.pipeline.layer_rows import arrange, restore
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.typing import Array, PyTree

HOST = "pinned_host"


@dataclass(frozen=True)
class LayerOrder:
    """Between the rows of a partition's stages and layers in the model's order, for the stacked arrays of a state.

    Those are the parameters at the paths `stacked`, and whatever a state has under the same path, such as moments.
    """

    partition: Partition
    stacked: frozenset[tuple[str, ...]]

    def abstract(self, state: PyTree) -> PyTree:
        """Shapes and shardings of `in_model_order` of an abstract state."""
        if self.partition.is_in_order:
            return state
        return jax.tree.map_with_path(lambda path, leaf: self._ordered(leaf) if self._has(path) else leaf, state)

    def in_model_order(self, state: PyTree) -> PyTree:
        """The state as it is saved; reordered arrays are on the host where JAX can, so that devices hold one more."""
        if self.partition.is_in_order:
            return state

        def convert(path: KeyPath, leaf: Array) -> Array:
            if not self._has(path):
                return leaf
            spec = _spec(self._ordered(leaf))
            return _to_host(_mover(self.partition, True, spec, spec)(leaf))

        return jax.tree.map_with_path(convert, state)

    def in_stage_order(self, state: PyTree, like: PyTree) -> PyTree:
        """The inverse of `in_model_order`, laid out as the abstract state `like`; consumes the arrays of `state`."""
        if self.partition.is_in_order:
            return state

        def convert(path: KeyPath, leaf: Array, wanted: jax.ShapeDtypeStruct) -> Array:
            if not self._has(path):
                return leaf
            arranged = _mover(self.partition, False, _spec(leaf), _spec(wanted))(leaf)
            # before the next one is made: one array at a time exists twice
            jax.block_until_ready(arranged)
            leaf.delete()
            return arranged

        return jax.tree.map_with_path(convert, state, like)

    def _has(self, path: KeyPath) -> bool:
        names = parts(path)
        return any(names[start:] in self.stacked for start in range(len(names)))

    def _ordered(self, leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding
        assert isinstance(sharding, NamedSharding)
        shape = (self.partition.num_layers, *leaf.shape[1:])
        sharding = NamedSharding(sharding.mesh, _without_rows(sharding, shape))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def layer_order(partition: Partition, blueprint: Blueprint) -> LayerOrder:
    """The order of a model whose stacked parameters `partition` lays out."""
    axes = jax.tree.leaves_with_path(blueprint.axes, is_leaf=lambda node: isinstance(node, tuple))
    return LayerOrder(partition, frozenset(parts(path) for path, names in axes if names[:1] == ("layers",)))


def _without_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec with the axes of the rows on the first other dimension that they divide; copied where none is."""
    rows, *rest = (_axes(entry) for entry in (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))))
    sizes = sharding.mesh.shape
    for dim, axes in enumerate(rest):
        if shape[dim + 1] % math.prod(sizes[axis] for axis in (*axes, *rows)) == 0:
            rest[dim] = (*axes, *rows)
            break
    return PartitionSpec(None, *(axes or None for axes in rest))


def _spec(leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    assert isinstance(leaf.sharding, NamedSharding)
    return leaf.sharding.spec


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@functools.cache
def _mover(
    partition: Partition, to_model_order: bool, where_whole: PartitionSpec, wanted: PartitionSpec
) -> Callable[[Array], Array]:
    """Compiled: change the layout, reorder the rows where every device has all of them, change the layout."""
    reorder = functools.partial(restore if to_model_order else arrange, partition)

    def move(leaf: Array) -> Array:
        whole = jax.sharding.reshard(leaf, where_whole)
        return jax.sharding.reshard(jax.sharding.auto_axes(reorder, out_sharding=where_whole)(whole), wanted)

    return jax.jit(move)


def _to_host(array: Array) -> Array:
    sharding = array.sharding
    kinds = {memory.kind for device in sharding.addressable_devices for memory in device.addressable_memories()}
    if HOST not in kinds:
        return array
    moved = jax.block_until_ready(jax.device_put(array, sharding.with_memory_kind(HOST)))
    array.delete()
    return moved

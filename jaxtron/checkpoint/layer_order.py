"""A state as checkpoints have it, whatever mesh wrote it: layers in the model's order, parameters in their own shapes.

With several stages the rows of stacked arrays lie in the stages' order, some of them empty. An array at a time is
split along another dimension instead, so that every device has all rows of its part and reorders them by itself.
Padding that makes parts even is left to the disk: it is cut from what was written, and zeros when read.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from jaxtron.checkpoint.names import parts, signature
from jaxtron.checkpoint.record import Signature
from jaxtron.pipeline.layer_slots import arrange, restore
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.layout import spec_axes
from jaxtron.sharding.parameters import fit
from jaxtron.typing import Array, PyTree

HOST = "pinned_host"


@dataclass(frozen=True)
class LayerOrder:
    """Between the slots of all stages and layers in the model's order, for the stacked arrays of a state.

    Those are the parameters at the paths `stacked`, each with its stack's partition, and whatever a state has under the
    same path, such as moments.
    """

    stacked: Mapping[tuple[str, ...], Partition]
    shapes: Mapping[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)
    """Of the parameters that have padding at rest: their own, of stacked ones with all rows."""

    def on_disk(self, state: PyTree) -> Signature:
        """What a checkpoint of the state is said to have: layers in the model's order, no padding."""

        def stored(path: KeyPath, leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = self.shapes.get(self._name(path, self.shapes), leaf.shape)
            if (partition := self._reordered(path)) is not None:
                shape = (partition.num_layers, *shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        return signature(jax.tree.map_with_path(stored, state))

    def abstract(self, state: PyTree) -> PyTree:
        """Shapes and shardings of `in_model_order` of an abstract state."""

        def convert(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            partition = self._reordered(path)
            return leaf if partition is None else _ordered(partition, leaf)

        return jax.tree.map_with_path(convert, state)

    def in_model_order(self, state: PyTree) -> PyTree:
        """The state as it is saved; reordered arrays are on the host where JAX can, so that devices hold one more."""

        def convert(path: KeyPath, leaf: Array) -> Array:
            if (partition := self._reordered(path)) is None:
                return leaf
            ordered = _ordered(partition, leaf)
            spec = _spec(ordered)
            return _to_host(_mover(partition, True, spec, spec, ordered.shape[1:])(leaf))

        return jax.tree.map_with_path(convert, state)

    def in_stage_order(self, state: PyTree, like: PyTree) -> PyTree:
        """The inverse of `in_model_order`, laid out as the abstract state `like`; consumes the arrays of `state`."""

        def convert(path: KeyPath, leaf: Array, wanted: jax.ShapeDtypeStruct) -> Array:
            if (partition := self._reordered(path)) is None:
                return leaf
            arranged = _mover(partition, False, _spec(leaf), _spec(wanted), wanted.shape[1:])(leaf)
            # before the next one is made: one array at a time exists twice
            jax.block_until_ready(arranged)
            leaf.delete()
            return arranged

        return jax.tree.map_with_path(convert, state, like)

    def _reordered(self, path: KeyPath) -> Partition | None:
        """The partition of a stacked array whose slots are not the layers in order."""
        partition = self.stacked.get(self._name(path, self.stacked))
        return None if partition is None or partition.is_in_order else partition

    def _name(self, path: KeyPath, known: Collection[tuple[str, ...]]) -> tuple[str, ...]:
        """The known end of a path, which a parameter's moments have too; () where there is none."""
        names = parts(path)
        return next((names[start:] for start in range(len(names)) if names[start:] in known), ())


def layer_order(partitions: Mapping[str, Partition], blueprint: Blueprint) -> LayerOrder:
    """The order of a model whose stacks, by their paths in the parameters, the partitions lay out."""
    specs = [(parts(path), spec) for path, spec in jax.tree.leaves_with_path(blueprint.parameters)]
    return LayerOrder(
        {path: _partition_of(path, partitions) for path, spec in specs if spec.is_stacked},
        {path: spec.shape for path, spec in specs if spec.shape != spec.layout.padded},
    )


def _partition_of(name: tuple[str, ...], partitions: Mapping[str, Partition]) -> Partition:
    return next(partition for path, partition in partitions.items() if "/".join(name).startswith(f"{path}/"))


def _ordered(partition: Partition, leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    shape, spec = _without_rows(sharding, leaf.shape[1:])
    sharding = NamedSharding(sharding.mesh, spec)
    return jax.ShapeDtypeStruct((partition.num_layers, *shape), leaf.dtype, sharding=sharding)


def _without_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[tuple[int, ...], PartitionSpec]:
    """Shape and spec with the axes of the rows on another dimension, the first that they divide.

    Where they divide none, the one that is padded least; without any they are left out, and the array is copied.
    """
    rows, *rest = (*spec_axes(sharding.spec), *((),) * (len(shape) + 1 - len(sharding.spec)))
    counts = [math.prod(sharding.mesh.shape[axis] for axis in (*axes, *rows)) for axes in rest]
    padded = [math.ceil(size / count) * count for size, count in zip(shape, counts, strict=True)]
    if shape:
        dim = min(range(len(shape)), key=lambda dim: padded[dim] / shape[dim])
        shape = (*shape[:dim], padded[dim], *shape[dim + 1 :])
        rest[dim] = (*rest[dim], *rows)
    return shape, PartitionSpec(None, *(axes or None for axes in rest))


def _spec(leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    assert isinstance(leaf.sharding, NamedSharding)
    return leaf.sharding.spec


@functools.cache
def _mover(
    partition: Partition,
    to_model_order: bool,
    where_whole: PartitionSpec,
    wanted: PartitionSpec,
    shape: tuple[int, ...],
) -> Callable[[Array], Array]:
    """Compiled: change the layout, reorder the rows where every device has all of them, change the layout.

    `shape` is that of a row of the result, with more or less padding.
    """
    reorder = functools.partial(restore if to_model_order else arrange, partition)

    def move(leaf: Array) -> Array:
        before, after = (shape, shape) if to_model_order else (leaf.shape[1:], shape)
        whole = _laid_out(leaf, before, where_whole)
        reordered: Callable[[Array], Array] = jax.sharding.auto_axes(  # pyright: ignore[reportAssignmentType]
            reorder, out_sharding=where_whole
        )
        return _laid_out(reordered(whole), after, wanted)

    return jax.jit(move)


def _laid_out(leaf: Array, shape: tuple[int, ...], spec: PartitionSpec) -> Array:
    """The array with rows of this shape, cut or padded, and this spec."""
    if leaf.shape[1:] == shape:
        return jax.sharding.reshard(leaf, spec)
    fitted: Callable[[Array], Array] = jax.sharding.auto_axes(  # pyright: ignore[reportAssignmentType]
        lambda leaf: fit(leaf, (leaf.shape[0], *shape)), out_sharding=spec
    )
    return fitted(leaf)


def _to_host(array: Array) -> Array:
    sharding = array.sharding
    kinds = {memory.kind for device in sharding.addressable_devices for memory in device.addressable_memories()}
    if HOST not in kinds:
        return array
    moved = jax.block_until_ready(jax.device_put(array, sharding.with_memory_kind(HOST)))
    array.delete()
    return moved

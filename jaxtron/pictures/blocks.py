"""How an array is cut over a mesh, and which devices have which block: from a spec alone, without devices."""

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtron.config import UserError
from jaxtron.pictures.grid import mesh_sizes

Block = tuple[int, ...]


@dataclass(frozen=True)
class ArrayBlocks:
    """An array of `shape`, cut along its dimensions into `parts`, each of the shape `part`; the last may be padding.

    `axes` are the mesh axes of several parts that cut each dimension, outermost first. `devices` has, by a block's
    place along every dimension, the numbers of the devices that hold it, which are its replicas.
    """

    shape: tuple[int, ...]
    parts: tuple[int, ...]
    part: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    devices: dict[Block, tuple[int, ...]]

    @property
    def replicas(self) -> int:
        """Devices that hold the same block."""
        return len(next(iter(self.devices.values())))

    @property
    def padding(self) -> int:
        """Elements behind the array that make its parts even."""
        return math.prod(part * parts for part, parts in zip(self.part, self.parts, strict=True)) - math.prod(
            self.shape
        )

    def slices(self, block: Block) -> tuple[slice, ...]:
        """What a block has of the array; empty where it is padding alone."""
        return tuple(
            slice(min(place * part, size), min((place + 1) * part, size))
            for place, part, size in zip(block, self.part, self.shape, strict=True)
        )


def array_blocks(shape: Iterable[Any], spec: Iterable[Any], mesh: Any) -> ArrayBlocks:
    """The blocks of an array of this shape under a spec, on a mesh (a JAX mesh, or sizes by axis, outermost first).

    `spec` is a `jax.sharding.PartitionSpec`, or for each dimension None, the name of a mesh axis, or several. Devices
    are numbered as the mesh's are, or in its order. Raises `UserError` for what is no layout: axes that the mesh does
    not have or that are used twice, more entries than dimensions.
    """
    sizes = mesh_sizes(mesh)
    dims = _dims(shape)
    axes = _spec_axes(spec, len(dims), sizes)
    parts = tuple(math.prod(sizes[axis] for axis in own) for own in axes)
    part = tuple(-(-size // count) for size, count in zip(dims, parts, strict=True))
    count = math.prod(sizes.values())
    places = dict(zip(sizes, np.unravel_index(np.arange(count), tuple(sizes.values())), strict=True))
    along = [_place(places, sizes, own, count) for own in axes]
    numbers = _device_numbers(mesh, count)
    found: dict[Block, list[int]] = {block: [] for block in itertools.product(*map(range, parts))}
    for place, device in enumerate(numbers):
        found[tuple(int(column[place]) for column in along)].append(device)
    return ArrayBlocks(dims, parts, part, axes, {block: tuple(held) for block, held in found.items()})


def _dims(shape: Iterable[Any]) -> tuple[int, ...]:
    try:
        dims = tuple(shape)
    except TypeError:
        raise UserError(f"a shape is a tuple of sizes such as (4096, 1024), not {shape!r}") from None
    for size in dims:
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise UserError(
                f"shape {dims} has {size!r}: give whole sizes above 0, for an array without elements has no blocks"
            )
    return tuple(int(size) for size in dims)


def _spec_axes(spec: Iterable[Any], num_dims: int, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    if isinstance(spec, str) or not isinstance(spec, Iterable):
        raise UserError(f"a spec has an entry for each dimension, such as (None, 'tensor'), not {spec!r}")
    entries = list(spec)
    if len(entries) > num_dims:
        raise UserError(f"spec {tuple(entries)} has {len(entries)} entries, and the array {num_dims} dimensions")
    found: list[tuple[str, ...]] = []
    for entry in entries + [None] * (num_dims - len(entries)):
        if entry is None:
            own: tuple[Any, ...] = ()
        elif isinstance(entry, str):
            own = (entry,)
        elif isinstance(entry, list | tuple):
            own = tuple(entry)
        else:
            raise UserError(f"spec entry {entry!r} says no layout: give None, a mesh axis, or several of them")
        for axis in own:
            if axis not in sizes:
                near = difflib.get_close_matches(str(axis), sizes, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sizes)}"
                raise UserError(f"spec names the mesh axis {axis!r}, and the mesh has no such: {hint}")
            if axis in itertools.chain(*found) or own.count(axis) > 1:
                raise UserError(f"spec names the mesh axis {axis!r} twice, and an axis cuts one dimension once")
        found.append(own)
    # an axis of one part cuts nothing
    return tuple(tuple(axis for axis in own if sizes[axis] > 1) for own in found)


def _place(places: Mapping[str, np.ndarray], sizes: Mapping[str, int], axes: tuple[str, ...], count: int) -> np.ndarray:
    """Each device's block along a dimension; the first of several axes cuts it first."""
    found = np.zeros(count, int)
    for axis in axes:
        found = found * sizes[axis] + places[axis]
    return found


def _device_numbers(mesh: Any, count: int) -> list[int]:
    """The numbers that JAX gives a mesh's devices; in the mesh's order where there are none."""
    try:
        return [int(number) for number in mesh.device_ids.flat]
    except (AttributeError, ValueError):
        return list(range(count))

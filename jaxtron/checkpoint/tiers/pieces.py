"""A state as pieces on the host, and back: what a process's devices have of each array, once each."""

import hashlib
import json
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Shaped

from jaxtron.checkpoint.names import from_plain, name_of, plain, plain_abstract
from jaxtron.checkpoint.tiers.part_file import Pieces
from jaxtron.typing import Array, Device, PyTree

Index = tuple[slice, ...]


def piece_name(name: str, index: Index, shape: tuple[int, ...]) -> str:
    """Of the part of an array that an index says, such as `params.final_norm.scale[0:8]`."""
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop, _ in bounds)}]"


def take(state: PyTree) -> Pieces:
    """The pieces of this process's devices, copied to the host: the arrays may be donated once it returns."""
    leaves = [(name_of(path), plain(leaf)) for path, leaf in jax.tree.leaves_with_path(state)]
    for _, leaf in leaves:
        for shard in leaf.addressable_shards:
            shard.data.copy_to_host_async()
    found: dict[str, np.ndarray] = {}
    for name, leaf in leaves:
        for shard in leaf.addressable_shards:
            piece = piece_name(name, shard.index, leaf.shape)
            if piece not in found:
                found[piece] = on_host(shard.data)
    return found


def on_host(array: Array) -> Shaped[np.ndarray, "..."]:
    """A copy of an array of one device; on CPUs NumPy would only look at the device's own memory."""
    is_there = next(iter(array.devices())).platform == "cpu"
    return np.array(array, copy=True) if is_there else np.ascontiguousarray(array)


def names_needed(abstract: PyTree) -> set[str]:
    """The pieces that this process's devices need for such a state."""
    return {name for path, like in _plain_leaves(abstract) for name in _by_device(name_of(path), like).values()}


def put(pieces: Pieces, abstract: PyTree) -> PyTree:
    """The state of these pieces, laid out as the abstract one."""

    def place(path: jax.tree_util.KeyPath, like: jax.ShapeDtypeStruct) -> Array:
        raw = plain_abstract(like)
        parts = [jax.device_put(pieces[name], device) for device, name in _by_device(name_of(path), raw).items()]
        return from_plain(jax.make_array_from_single_device_arrays(raw.shape, raw.sharding, parts), like)

    return jax.tree.map_with_path(place, abstract)


def layout_of(abstract: PyTree, *more: str) -> str:
    """A word for names, types and shapes of a state, and what else is said: the same where pieces fit."""
    leaves = [(name_of(path), str(like.dtype), list(like.shape)) for path, like in jax.tree.leaves_with_path(abstract)]
    return hashlib.sha256(json.dumps([leaves, *more]).encode()).hexdigest()[:16]


def local_bytes(abstract: PyTree) -> int:
    """Bytes of the pieces that `take` would give of such a state."""
    total = 0
    for path, like in _plain_leaves(abstract):
        assert like.sharding is not None
        shard = int(np.prod(like.sharding.shard_shape(like.shape))) * like.dtype.itemsize
        total += shard * len(set(_by_device(name_of(path), like).values()))
    return total


def _plain_leaves(abstract: PyTree) -> Iterable[tuple[jax.tree_util.KeyPath, jax.ShapeDtypeStruct]]:
    return ((path, plain_abstract(like)) for path, like in jax.tree.leaves_with_path(abstract))


def _by_device(name: str, like: jax.ShapeDtypeStruct) -> dict[Device, str]:
    """For each device of this process, the piece of an array that it has."""
    assert like.sharding is not None
    places = like.sharding.addressable_devices_indices_map(like.shape)
    return {device: piece_name(name, index or (), like.shape) for device, index in places.items()}

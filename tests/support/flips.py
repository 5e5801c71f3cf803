"""Bits that turn over, in arrays of the host and on one device of many."""

import jax
import numpy as np


def flipped(array: np.ndarray, place: int, bit: int) -> np.ndarray:
    """A copy with one bit of its `place`-th number turned over, the lowest being bit 0."""
    changed = array.copy()
    raw = changed.reshape(-1).view(np.uint8).reshape(array.size, array.dtype.itemsize)
    raw[place, bit // 8] ^= np.uint8(1 << bit % 8)
    return changed


def flipped_on(array: jax.Array, device: jax.Device, *, place: int = 0, bit: int = 0) -> jax.Array:
    """The same array, but for a bit of what this one device has of it."""
    parts = [np.asarray(shard.data) for shard in array.addressable_shards]
    devices = [shard.device for shard in array.addressable_shards]
    parts = [flipped(part, place, bit) if own == device else part for part, own in zip(parts, devices, strict=True)]
    placed = [jax.device_put(part, own) for part, own in zip(parts, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)

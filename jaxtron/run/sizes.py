"""What can never fit: the state of a model, and the rows of a batch, against the memory of the devices."""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxtron.config import UserError
from jaxtron.run.batches import batch_row_bytes
from jaxtron.run.configuration import Configuration
from jaxtron.typing import PyTree

GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_state_fits(sizes: str, state: PyTree, *, what: str) -> None:
    """`UserError` if one device's part of an abstract state, `what` of such a model, is larger than its memory.

    Only what is certain before anything runs: a program needs more than its arguments.
    """
    needed, memory = sum(map(bytes_on_a_device, jax.tree.leaves(state))), device_memory()
    if needed > memory:
        raise UserError(
            f"the {what} of {sizes} would take {_gib(needed)} of each device, and {_device()} has {_gib(memory)}: "
            "choose a smaller model, or split it over more devices with --mesh.fsdp"
        )


def check_batch_fits(name: str, rows: int, config: Configuration) -> None:
    """`UserError` if one device's part of a batch, whose size is the setting `name`, is larger than its memory."""
    needed, memory = rows * batch_row_bytes(config) // jax.device_count(), device_memory()
    if needed > memory:
        raise UserError(
            f"{name} {rows:,} x data.sequence_length {config.data.sequence_length:,} would take {_gib(needed)} of "
            f"each device, and {_device()} has {_gib(memory)}: lower one"
        )


def bytes_on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's part of an array; without a sharding, all of it."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    itemsize = 4 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(shape) * itemsize


def device_memory() -> int:
    """Bytes that a device of this process can have: its own, or its share of the machine's."""
    devices = jax.local_devices()
    found = (devices[0].memory_stats() or {}).get("bytes_limit") if devices[0].platform != "cpu" else None
    return found or machine_memory() // len(devices)


def machine_memory() -> int:
    """Bytes of main memory, or fewer where this process's group is given fewer."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdecimal() else memory


def _device() -> str:
    return f"a {jax.local_devices()[0].device_kind} here"


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"

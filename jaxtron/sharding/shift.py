"""What one device has, on another: parts of arrays sent along given pairs, the way that gradients travel."""

import functools

import jax
from jax.sharding import PartitionSpec

from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current
from jaxtron.typing import Array

# rows of `mesh.devices.flat`: from the first to the second, each once on either side
Pairs = tuple[tuple[int, int], ...]


@functools.partial(jax.jit, static_argnums=1)
def shifted(array: Array, pairs: Pairs) -> Array:
    """[device, ...]: of each device the part that the one paired with it has; inside `sharding.use(rules)`."""
    axes = current().mesh.axis_names

    def send(part: Array) -> Array:
        return jax.lax.ppermute(part, axes, pairs)[None]

    return on_each_device(send, (jax.typeof(array).sharding.spec,), PartitionSpec(axes))(array)

"""How a sequence lies over `mesh.context`: every device has two pieces of it, so that causal work is even."""

import jax
import jax.numpy as jnp

from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Int


def starts(
    config: ContextConfig, size: int, rank: Int[Array, ""] | int, length: int
) -> tuple[Array | int, Array | int]:
    """First positions of a device's two pieces, each half of its `length` positions.

    Ring member g of n has the g-th and the g-th last of 2n blocks (zigzag), shared out among its inner neighbours.
    """
    inner, outer = config.groups(size)
    member, neighbour = rank // inner, rank % inner
    half = length // 2
    block = half * inner
    return member * block + neighbour * half, (2 * outer - 1 - member) * block + neighbour * half


def positions(config: ContextConfig, size: int, length: int) -> Int[Array, "S"]:
    """Positions in the whole sequence of the `length` that this device has, inside the manual region."""
    if size == 1:
        return jnp.arange(length)
    half = jnp.arange(length // 2)
    first, second = starts(config, size, jax.lax.axis_index(current().axes("context")), length)
    return jnp.concatenate([first + half, second + half])


def part(config: ContextConfig, size: int, x: Array, axis: int) -> Array:
    """This device's two pieces of `x`, whole along `axis`, inside the manual region."""
    if size == 1:
        return x
    length = x.shape[axis] // size
    first, second = starts(config, size, jax.lax.axis_index(current().axes("context")), length)
    pieces = [jax.lax.dynamic_slice_in_dim(x, start, length // 2, axis) for start in (first, second)]
    return jnp.concatenate(pieces, axis)

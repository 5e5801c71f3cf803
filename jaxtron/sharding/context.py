"""How a sequence lies over `mesh.context`: every device has two pieces of it, so that causal work is even."""

from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from jaxtron.config import Config, UserError
from jaxtron.typing import Array, Int

AXIS = "context"
Method = Literal["ring", "all_gather", "all_to_all", "hierarchical"]


class ContextConfig(Config):
    """How attention sees the rest of a sequence that `mesh.context` splits."""

    method: Method = "ring"
    """ring: keys and values go round, a block a step; all_gather: they are gathered; all_to_all: heads are split
    instead of the sequence; hierarchical: all_to_all among `inner` neighbours, a ring across."""
    inner: int = Field(default=8, ge=2)
    """Neighbours of the hierarchical method, such as the GPUs of a node."""

    def groups(self, size: int) -> tuple[int, int]:
        """Devices that split heads, and devices of the ring, of so many along `mesh.context`."""
        if self.method == "all_to_all":
            return size, 1
        if self.method != "hierarchical":
            return 1, size
        if size % self.inner or size == self.inner:
            raise UserError(
                f"context.inner {self.inner} must divide mesh.context {size} and be smaller; "
                "use context.method all_to_all or ring for one group or groups of one"
            )
        return self.inner, size // self.inner


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
    first, second = starts(config, size, jax.lax.axis_index(AXIS), length)
    return jnp.concatenate([first + half, second + half])


def part(config: ContextConfig, size: int, x: Array, axis: int) -> Array:
    """This device's two pieces of `x`, whole along `axis`, inside the manual region."""
    if size == 1:
        return x
    length = x.shape[axis] // size
    first, second = starts(config, size, jax.lax.axis_index(AXIS), length)
    pieces = [jax.lax.dynamic_slice_in_dim(x, start, length // 2, axis) for start in (first, second)]
    return jnp.concatenate(pieces, axis)

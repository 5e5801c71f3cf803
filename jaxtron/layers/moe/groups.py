"""Rows of a device's experts, by expert and in tiles, as grouped products want them: from where each comes."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.spec import TILE
from jaxtron.typing import Array, Int


class Groups(NamedTuple):
    """Rows as they came, [device, row], and as they are multiplied."""

    sources: Int[Array, "R"]
    """Of each row that is multiplied, which it is of those that came; as many as came for none."""
    targets: Int[Array, "S"]
    """Of each row that came, where it goes; as many as are multiplied where it is none."""
    tile_experts: Int[Array, " tiles"]
    """The expert of each tile; as many as there are for tiles that are empty, which are last."""


def num_rows(num_came: int, num_experts: int) -> int:
    """Rows that are enough however those that came are shared out over the experts, each rounded up to tiles."""
    tiles = (num_came + num_experts * (TILE - 1)) // TILE
    return TILE * max(1, min(tiles, num_came))


def make_groups(arrivals: Int[Array, "D M"], first: Int[Array, ""] | int, rows: int) -> Groups:
    """Of the pairs that each device has for each expert, by expert, those from place `first` on, `rows` of a device."""
    num_devices, num_experts = arrivals.shape
    ends = jnp.clip(jnp.cumsum(arrivals, 1, dtype=jnp.int32) - first, 0, rows)
    starts = jnp.clip(jnp.cumsum(arrivals, 1, dtype=jnp.int32) - arrivals - first, 0, rows)
    counts = ends - starts
    tiles = -(-counts.sum(0, dtype=jnp.int32) // TILE)
    last_tiles = jnp.cumsum(tiles, dtype=jnp.int32)
    # where the rows of a device for an expert begin, less where they began
    shift = (last_tiles - tiles) * TILE + jnp.cumsum(counts, 0, dtype=jnp.int32) - counts - starts
    place = jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.sum(place[:, None] >= ends[:, None], -1, dtype=jnp.int32)
    total = num_rows(num_devices * rows, num_experts)
    moved = place + jnp.take_along_axis(shift, jnp.minimum(expert, num_experts - 1), 1)
    targets = jnp.where(expert < num_experts, moved, total).reshape(-1)
    came = jnp.arange(targets.size, dtype=jnp.int32)
    sources = jnp.full(total, targets.size, jnp.int32).at[targets].set(came, mode="drop", unique_indices=True)
    tile = jnp.arange(total // TILE, dtype=jnp.int32)
    return Groups(sources, targets, jnp.sum(tile[:, None] >= last_tiles, 1, dtype=jnp.int32))

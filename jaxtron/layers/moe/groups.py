"""Pairs of a device's experts, by expert and in tiles, as grouped products want them: of which token's row each is."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.config import TILE, tiled_rows
from jaxtron.typing import Array, Float, Int


class Groups(NamedTuple):
    """Rows as they came, each of a token with its choices, and pairs as they are multiplied."""

    sources: Int[Array, "M"]
    """Of each row that is multiplied, its place among the choices of all rows that came; as many as there are for none.
    """
    targets: Int[Array, "R K"]
    """Of each choice of a row that came, where it goes; as many as are multiplied where it is another device's."""
    tile_experts: Int[Array, " tiles"]
    """The expert of each tile; as many as there are for tiles that are empty, which are last."""


def make_groups(chosen: Int[Array, "R K"], num_experts: int, num_pairs: int) -> Groups:
    """Of the experts that rows' tokens chose, `num_experts` for none, no expert twice and at most so many pairs."""
    total = tiled_rows(num_pairs, num_experts)
    # by row and expert
    is_chosen = jnp.any(chosen[:, :, None] == jnp.arange(num_experts), 1).astype(jnp.int32)
    until = jnp.cumsum(is_chosen, 0, dtype=jnp.int32)
    tiles = -(-until[-1] // TILE)
    last_tiles = jnp.cumsum(tiles, dtype=jnp.int32)
    places = (last_tiles - tiles) * TILE + until - is_chosen
    targets = jnp.take_along_axis(places, jnp.minimum(chosen, num_experts - 1), 1)
    targets = jnp.where(chosen < num_experts, targets, total)
    came = jnp.arange(targets.size, dtype=jnp.int32)
    sources = jnp.full(total, targets.size, jnp.int32)
    sources = sources.at[targets.reshape(-1)].set(came, mode="drop", unique_indices=True)
    tile = jnp.arange(total // TILE, dtype=jnp.int32)
    return Groups(sources, targets, jnp.sum(tile[:, None] >= last_tiles, 1, dtype=jnp.int32))


def spread(groups: Groups | None, rows: Float[Array, "*rows E"]) -> Float[Array, "*tiles E"]:
    """Rows as they came to where they are multiplied; the same where nothing is grouped."""
    if groups is None:
        return rows
    return rows.at[groups.sources // groups.targets.shape[1]].get(mode="fill", fill_value=0)


def spread_weights(groups: Groups | None, weights: Float[Array, "*rows K"]) -> Float[Array, "*tiles 1"]:
    """Of each row that is multiplied, the weight of its pair; the same where nothing is grouped."""
    if groups is None:
        return weights
    return weights.reshape(-1).at[groups.sources].get(mode="fill", fill_value=0)[:, None]


def collect(groups: Groups | None, tiles: Float[Array, "*tiles E"]) -> Float[Array, "*rows E"]:
    """The transpose of `spread`, summed in float32."""
    if groups is None:
        return tiles
    found = tiles.at[groups.targets].get(mode="fill", fill_value=0)
    return jnp.sum(found, 1, dtype=jnp.float32).astype(tiles.dtype)


def collect_weights(groups: Groups | None, tiles: Float[Array, "*tiles 1"]) -> Float[Array, "*rows K"]:
    """The transpose of `spread_weights`."""
    if groups is None:
        return tiles
    return tiles[:, 0].at[groups.targets].get(mode="fill", fill_value=0)

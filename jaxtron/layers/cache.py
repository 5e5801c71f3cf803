"""What attention remembers of sequences that grow: keys and values, in as many places as its queries look back.

Position p lies in place p modulo the number of places: of a window the newest key takes the place of one that no query
sees any more, and where there is room for the whole sequence each position has its own.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import spec
from jaxtron.typing import Array, Bool, Float, Int

# what splits them
CACHED = ("batch", "heads", None, "head_dim")
HEADS = ("batch", "full_seq", "heads", "head_dim")
# of a batch whose rows are written one after the other
MOST_ROWS = 16
# of places that no query sees
NEVER = jnp.finfo(jnp.float32).min


@functools.partial(jax.tree_util.register_dataclass, data_fields=("before", "counts"), meta_fields=("begins",))
@dataclass(frozen=True)
class Growth:
    """By how much each sequence of a batch grows: rows may have come differently far, and grow by different counts.

    New positions come first in a row; what is behind them is padding, of which nothing is remembered.
    """

    before: Int[Array, "B"]
    """Positions of each row so far."""
    counts: Int[Array, "B"]
    """New ones of each."""
    begins: bool = False
    """Whether nothing came before in any row."""

    def is_new(self, length: int) -> Bool[Array, "B S"]:
        """Which of so many positions of each row are no padding."""
        return jnp.arange(length) < self.counts[:, None]


class KeyValues(NamedTuple):
    """Keys and values by place."""

    keys: Float[Array, "B K P D"]
    values: Float[Array, "B K P V"]


def room_for(room: int, window: int | None, most: int) -> int:
    """Places that sequences of `room` positions need, of which at most so many are new at a time."""
    return room if window is None else min(room, window + most - 1)


def remember(
    memory: KeyValues, keys: Float[Array, "B S H D"], values: Float[Array, "B S H V"], growth: Growth
) -> KeyValues:
    """With the keys and values of the new positions.

    Of key/value heads that several parts of `mesh.tensor` share, each part remembers those of its own queries.
    """

    def local(memory: KeyValues, keys: Array, values: Array, before: Array, counts: Array) -> KeyValues:
        own = Growth(before, counts, growth.begins)
        write = _write_all if growth.begins else _write
        pairs = zip(memory, (keys, values), strict=True)
        return KeyValues(*(write(old, _by_head(new, old.shape[1]), own) for old, new in pairs))

    cached, heads, rows = spec(*CACHED), spec(*HEADS), spec("batch")
    # one spec for both halves of a memory
    run = on_each_device(local, (cached, heads, heads, rows, rows), cached)
    return run(memory, keys, values, growth.before, growth.counts)


def attend(
    queries: Float[Array, "B S H D"],
    memory: KeyValues,
    given: AttentionSpec,
    slopes: Float[Array, "H"] | None,
    sinks: Float[Array, "H"] | None,
    growth: Growth,
    distance_bias: Float[Array, "H N"] | None = None,
) -> Float[Array, "B S H V"]:
    """What new positions attend to in a memory that has them. Scores are in memory: queries are to be few."""

    def local(queries: Array, memory: KeyValues, before: Array, counts: Array, per_head: dict[str, Array]) -> Array:
        return _attend(queries, memory, given, Growth(before, counts), **per_head)

    named = {"slopes": slopes, "sinks": sinks, "distance_bias": distance_bias}
    per_head = {name: array for name, array in named.items() if array is not None}
    cached, heads, rows = spec(*CACHED), spec(*HEADS), spec("batch")
    specs = (heads, cached, rows, rows, {name: spec("heads") for name in per_head})
    return on_each_device(local, specs, heads)(queries, memory, growth.before, growth.counts, per_head)


def _by_head(new: Float[Array, "B S H D"], heads: int) -> Float[Array, "B K S D"]:
    """Of copies of a head one."""
    return new[:, :, :: new.shape[2] // heads].transpose(0, 2, 1, 3)


def _write(old: Float[Array, "B K P D"], new: Float[Array, "B K S D"], growth: Growth) -> Float[Array, "B K P D"]:
    """New positions in their places, all others as they are."""
    places, length = old.shape[2], new.shape[2]
    if length == 1 and len(old) <= MOST_ROWS:
        return _write_one(old, new.astype(old.dtype), growth)
    positions = growth.before[:, None] + jnp.arange(length)
    # padding has no place
    slots = jnp.where(growth.is_new(length), positions % places, places)
    rows = jnp.arange(old.shape[0])[:, None]
    return old.at[rows, :, slots].set(new.transpose(0, 2, 1, 3).astype(old.dtype), mode="drop", unique_indices=True)


def _write_one(old: Float[Array, "B K P D"], new: Float[Array, "B K 1 D"], growth: Growth) -> Float[Array, "B K P D"]:
    """Row by row, where XLA sees that it can write in place: it copies what a CPU scatters to.

    Padding goes to the place of the next position, which no query sees before that is there.
    """
    for row in range(len(old)):
        start = (row, 0, growth.before[row] % old.shape[2], 0)
        old = jax.lax.dynamic_update_slice(old, new[row : row + 1], start, allow_negative_indices=False)
    return old


def _write_all(old: Float[Array, "B K P D"], new: Float[Array, "B K S D"], growth: Growth) -> Float[Array, "B K P D"]:
    """Of sequences that begin, whatever is new and has a place."""
    positions = _positions(growth.counts, old.shape[2])
    index = jnp.clip(positions, 0, new.shape[2] - 1)
    return jnp.take_along_axis(new, index[:, None, :, None], 2).astype(old.dtype)


def _positions(counts: Int[Array, "B"], places: int) -> Int[Array, "B P"]:
    """Which position is in each place after so many; below zero where there is none yet."""
    last = counts[:, None] - 1
    return last - (last - jnp.arange(places)) % places


def _attend(
    queries: Float[Array, "B S H D"],
    memory: KeyValues,
    given: AttentionSpec,
    growth: Growth,
    slopes: Float[Array, "H"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    distance_bias: Float[Array, "H N"] | None = None,
) -> Float[Array, "B S H V"]:
    rows, length, heads, dim = queries.shape
    keys, values = memory
    groups = heads // keys.shape[1]
    scaled = queries * jnp.asarray(given.scale(dim), queries.dtype)
    # query heads that read one key head are rows of one product
    scaled = (
        scaled.reshape(rows, length, -1, groups, dim).transpose(0, 2, 3, 1, 4).reshape(rows, -1, groups * length, dim)
    )
    scores = jnp.einsum("bkqd,bkpd->bkqp", scaled, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, -1, groups, length, keys.shape[2])
    if given.logits_soft_cap is not None:
        scores = given.logits_soft_cap * jnp.tanh(scores / given.logits_soft_cap)
    after = growth.before + growth.counts
    positions = _positions(after, keys.shape[2])[:, None]
    distance = (growth.before[:, None] + jnp.arange(length))[:, :, None] - positions
    if slopes is not None:
        scores = scores - slopes.astype(jnp.float32).reshape(1, -1, groups, 1, 1) * distance[:, None, None]
    if distance_bias is not None:
        scores = scores + _by_distance(distance_bias.astype(jnp.float32), distance, groups)
    sees = (positions >= 0) & (distance >= 0)
    if given.window is not None:
        sees &= distance < given.window
    scores = jnp.where(sees[:, None, None], scores, NEVER)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, -1, groups, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], -1)
    weights = jax.nn.softmax(scores, -1)[..., : keys.shape[2]].astype(values.dtype)
    weights = weights.reshape(rows, -1, groups * length, keys.shape[2])
    summed = jnp.einsum("bkqp,bkpv->bkqv", weights, values)
    summed = summed.reshape(rows, -1, groups, length, values.shape[3]).transpose(0, 3, 1, 2, 4)
    return summed.reshape(rows, length, heads, values.shape[3])


def _by_distance(table: Float[Array, "H N"], distance: Int[Array, "B S P"], groups: int) -> Float[Array, "B K G S P"]:
    """What each head adds where a key is so far before a query; the table begins with the farthest before it."""
    numbers = jnp.clip(table.shape[1] // 2 - distance, 0, table.shape[1] - 1)
    found = jnp.take(table, numbers, axis=1).reshape(-1, groups, *distance.shape)
    return jnp.moveaxis(found, 2, 0)

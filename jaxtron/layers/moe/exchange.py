"""Tokens to the experts that they chose and back: what one device does where every mesh axis is manual.

A device has *pairs*, a token with one of its choices. They travel in rounds of a fixed size: in each, a device sends at
most `rows` pairs to a *bucket*, which is an expert, or all experts of a device. The first round takes nearly all of
them. Further rounds follow only while some device of the group has pairs left, so that shapes are static, memory is
that of one round, and however uneven the choices are, nothing is dropped. Both ways are gathers: by row on the way out,
by pair on the way back, each the other's transpose.

Or no pair travels: a device gets the tokens of all who share experts with it, takes the pairs of its own experts out of
them, and returns sums by token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.grouped_matmul import GroupedProducts
from jaxtron.layers.moe.groups import Groups, make_groups
from jaxtron.sharding.folding import Axes
from jaxtron.typing import Array, Int


@dataclass(frozen=True)
class Exchange:
    """Who exchanges, how much in a round, and how it lies where it is multiplied."""

    num_experts: int
    top_k: int
    expert: Axes
    """Axes of `mesh.expert`: along them lie the experts, and the tokens of as many devices."""
    num_devices: int
    """Devices along them."""
    expert_tensor: Axes
    """Axes of `mesh.expert_tensor`: devices along them share the width of the same experts."""
    gathers: bool
    """Whether tokens are gathered, rather than pairs sent."""
    rows: int
    """Pairs that a device has for one bucket in a round."""
    has_rounds: bool
    """Whether a second round can ever be needed."""
    grouped: GroupedProducts | None
    """What multiplies rows of a device's experts (none: a bucket is an expert, and one product is of all of them)."""

    @property
    def axes(self) -> Axes:
        """Those of all who meet."""
        return (*self.expert_tensor, *self.expert)

    @property
    def own_experts(self) -> int:
        """Experts of a device."""
        return self.num_experts // self.num_devices

    @property
    def known_experts(self) -> int:
        """Experts that a device's pairs are of: of tokens that were gathered, its own."""
        return self.own_experts if self.gathers else self.num_experts

    @property
    def of_bucket(self) -> int:
        """Experts of a bucket."""
        return 1 if self.grouped is None else self.own_experts

    @property
    def sends(self) -> bool:
        """Whether pairs go to another device."""
        return bool(self.axes) and not self.gathers


class Dispatch(NamedTuple):
    """Where a device's pairs go; made of the choices alone, once, in the forward."""

    order: Int[Array, "P"]
    """Pairs by expert; those that go nowhere last."""
    experts: Int[Array, "P"]
    """Of a pair, its expert; `known_experts` where it goes nowhere."""
    places: Int[Array, "P"]
    """Its place among those of its bucket."""
    starts: Int[Array, "N"]
    """A bucket's first place in `order`."""
    counts: Int[Array, "N"]
    """Its pairs."""
    arrivals: Int[Array, "D M"]
    """Pairs that each device has for each expert of this one; of one device where nothing is sent."""
    rounds: Int[Array, ""]
    """Rounds that the group needs."""


class Turn(NamedTuple):
    """One round of it."""

    pairs: Int[Array, "*rows"]
    """Of each row its pair; as many as there are for none."""
    rows: Int[Array, "P"]
    """Of each pair its row; as many as there are where it is not in this round."""
    groups: Groups | None
    """How rows lie where they are multiplied: by expert, in tiles."""


def make_dispatch(exchange: Exchange, chosen: Int[Array, "T K"]) -> Dispatch:
    """Where pairs go for these choices of experts, `num_experts` for none."""
    known, size = exchange.known_experts, exchange.of_bucket
    experts = chosen.reshape(-1)
    if exchange.gathers and exchange.expert:
        experts = experts - jax.lax.axis_index(exchange.expert) * known
        experts = jnp.where((experts >= 0) & (experts < known), experts, known)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    by_expert = jnp.sum(experts[:, None] == jnp.arange(known), 0, dtype=jnp.int32)
    counts = by_expert.reshape(-1, size).sum(1, dtype=jnp.int32)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    ranks = jnp.argsort(order).astype(jnp.int32)
    places = ranks - starts.at[experts // size].get(mode="fill", fill_value=0)
    arrivals, most = by_expert[None], jnp.max(counts)
    if exchange.sends and exchange.grouped is not None:
        arrivals = jax.lax.all_gather(by_expert, exchange.axes)
        if exchange.expert:
            own = jax.lax.axis_index(exchange.expert) * exchange.own_experts
            arrivals = jax.lax.dynamic_slice_in_dim(arrivals, own, exchange.own_experts, 1)
    rounds = -(-most // exchange.rows)
    # all who meet in a round must come to it: those that share experts, and those that share an expert's width
    if exchange.axes and exchange.has_rounds:
        rounds = jax.lax.pmax(rounds, exchange.axes)
    return Dispatch(order, experts, places, starts, counts, arrivals, rounds)


def make_turn(exchange: Exchange, dispatch: Dispatch, turn: Int[Array, ""] | int) -> Turn:
    """A round of it."""
    num_pairs, first = dispatch.order.size, turn * exchange.rows
    place = first + jnp.arange(exchange.rows, dtype=jnp.int32)
    pairs = dispatch.order.at[dispatch.starts[:, None] + place].get(mode="fill", fill_value=num_pairs)
    pairs = jnp.where(place < dispatch.counts[:, None], pairs, num_pairs)
    row = dispatch.places - first
    is_here = (row >= 0) & (row < exchange.rows) & (dispatch.experts < exchange.known_experts)
    rows = jnp.where(is_here, dispatch.experts // exchange.of_bucket * exchange.rows + row, pairs.size)
    if exchange.grouped is None:
        return Turn(pairs, rows, None)
    groups = make_groups(dispatch.arrivals, first, exchange.rows)
    if exchange.sends:
        return Turn(pairs, rows, groups)
    # nothing lies between the two ways: one gather is enough
    pairs = pairs.reshape(-1).at[groups.sources].get(mode="fill", fill_value=num_pairs)
    rows = groups.targets.at[rows].get(mode="fill", fill_value=pairs.size)
    return Turn(pairs, rows, groups)


def enter(exchange: Exchange, tokens: Array) -> Array:
    """What a device's pairs are taken of: [T, ...], its own tokens, or those of all who share experts with it."""
    if exchange.gathers and exchange.axes:
        return jax.lax.all_gather(tokens, exchange.axes, tiled=True)
    return tokens


def leave(exchange: Exchange, sums: Array) -> Array:
    """The transpose of `enter`."""
    if exchange.gathers and exchange.axes:
        return jax.lax.psum_scatter(sums, exchange.axes, tiled=True)
    return sums


def send(exchange: Exchange, turn: Turn, values: Array) -> Array:
    """Of each pair [T, K, ...], or of each token [T, 1, ...], the value at its expert: [*rows, ...], zeros elsewhere.

    Rows are [own expert, row], or in the tiles of `groups`: of all devices that send here, and where devices share an
    expert's width, each gets the rows of all.
    """
    flat = values.reshape(-1, *values.shape[2:])
    rows = flat.at[turn.pairs // (exchange.top_k // values.shape[1])].get(mode="fill", fill_value=0)
    if not exchange.sends:
        return rows
    # [device, own expert, row, ...], or [device, row, ...]
    rows = rows.reshape(exchange.num_devices, exchange.own_experts // exchange.of_bucket, *rows.shape[1:])
    if exchange.expert:
        rows = jax.lax.all_to_all(rows, exchange.expert, 0, 0)
    rows = jnp.moveaxis(rows, 1, 0)
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    if exchange.expert_tensor:
        rows = jax.lax.all_gather(rows, exchange.expert_tensor, axis=1, tiled=True)
    if turn.groups is None:
        return rows
    return rows[0].at[turn.groups.sources].get(mode="fill", fill_value=0)


def receive(exchange: Exchange, turn: Turn, rows: Array) -> Array:
    """The transpose of `send` of pairs: [*rows, ...] back where they came from, [T, K, ...].

    Where devices share an expert's width, their rows are summed. Zeros for pairs that are not in this round.
    """
    if exchange.sends:
        if turn.groups is not None:
            rows = rows.at[turn.groups.targets].get(mode="fill", fill_value=0)[None]
        if exchange.expert_tensor:
            rows = jax.lax.psum_scatter(rows, exchange.expert_tensor, scatter_dimension=1, tiled=True)
        rows = rows.reshape(rows.shape[0], exchange.num_devices, exchange.rows, *rows.shape[2:])
        rows = jnp.moveaxis(rows, 1, 0)
        if exchange.expert:
            rows = jax.lax.all_to_all(rows, exchange.expert, 0, 0)
        rows = rows.reshape(*turn.pairs.shape, *rows.shape[3:])
    flat = rows.reshape(-1, *rows.shape[turn.pairs.ndim :])
    found = flat.at[turn.rows].get(mode="fill", fill_value=0)
    return found.reshape(-1, exchange.top_k, *flat.shape[1:])


def receive_tokens(exchange: Exchange, turn: Turn, rows: Array) -> Array:
    """The transpose of `send` of tokens: float32 sums over their pairs [T, ...]."""
    return jnp.sum(receive(exchange, turn, rows), 1, dtype=jnp.float32)

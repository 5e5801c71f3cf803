"""Tokens to the experts that they chose and back: what one device does where every mesh axis is manual.

A device has *pairs*, a token with one of its choices. They travel in rounds of a fixed size: in each, a device sends at
most `rows` pairs to an expert. The first round takes nearly all of them. Further rounds follow only while some device
of the group has pairs left, so that shapes are static, memory is that of one round, and however uneven the choices are,
nothing is dropped. Both ways are gathers: by row on the way out, by pair on the way back, each the other's transpose.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.sharding.folding import Axes
from jaxtron.typing import Array, Float, Int


@dataclass(frozen=True)
class Exchange:
    """Who exchanges, and how much in a round."""

    num_experts: int
    top_k: int
    expert: Axes
    """Axes of `mesh.expert`: along them lie the experts, and the tokens of as many devices."""
    num_devices: int
    """Devices along them."""
    expert_tensor: Axes
    """Axes of `mesh.expert_tensor`: devices along them share the width of the same experts."""
    num_parts: int
    """Devices along these."""
    rows: int
    """Pairs that a device sends to one expert in a round."""
    has_rounds: bool
    """Whether a second round can ever be needed."""

    @property
    def own_experts(self) -> int:
        """Experts of a device."""
        return self.num_experts // self.num_devices


class Dispatch(NamedTuple):
    """Where a device's pairs go; made of the choices alone, and made again in the backward."""

    order: Int[Array, "P"]
    """Pairs by expert; those that go nowhere last."""
    starts: Int[Array, "N"]
    """An expert's first place in `order`."""
    counts: Int[Array, "N"]
    """Its pairs."""
    places: Int[Array, "P"]
    """Of a pair, its place among those of its expert."""
    experts: Int[Array, "P"]
    """Its expert; `num_experts` where it goes nowhere."""
    rounds: Int[Array, ""]
    """Rounds that the group needs."""


def make_dispatch(exchange: Exchange, chosen: Int[Array, "T K"]) -> Dispatch:
    """Where pairs go for these choices of experts, `num_experts` for none."""
    experts = chosen.reshape(-1)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    counts = jnp.sum(experts[:, None] == jnp.arange(exchange.num_experts), 0, dtype=jnp.int32)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    ranks = jnp.argsort(order).astype(jnp.int32)
    places = ranks - starts.at[experts].get(mode="fill", fill_value=0)
    rounds = -(-jnp.max(counts) // exchange.rows)
    # all who meet in a round must come to it: those that share experts, and those that share an expert's width
    if axes := (*exchange.expert, *exchange.expert_tensor):
        rounds = jax.lax.pmax(rounds, axes)
    return Dispatch(order, starts, counts, places, experts, rounds)


def send(exchange: Exchange, dispatch: Dispatch, turn: Int[Array, ""] | int, values: Array) -> Array:
    """Of each pair [T, K, ...], or of each token [T, 1, ...], the value at its expert: [own expert, row, ...].

    Rows of all devices that send here, zeros where none came; where devices share an expert's width, each gets the rows
    of all.
    """
    place = turn * exchange.rows + jnp.arange(exchange.rows, dtype=jnp.int32)
    pair = dispatch.order.at[dispatch.starts[:, None] + place].get(mode="fill", fill_value=0)
    flat = values.reshape(-1, *values.shape[2:])
    source = pair // (exchange.top_k // values.shape[1])
    rows = flat.at[jnp.where(place < dispatch.counts[:, None], source, flat.shape[0])].get(mode="fill", fill_value=0)
    # [device, own expert, row, ...]
    rows = rows.reshape(exchange.num_devices, exchange.own_experts, *rows.shape[1:])
    if exchange.expert:
        rows = jax.lax.all_to_all(rows, exchange.expert, 0, 0)
    rows = jnp.moveaxis(rows, 1, 0).reshape(exchange.own_experts, -1, *rows.shape[3:])
    return widen(exchange, rows)


def widen(exchange: Exchange, rows: Array) -> Array:
    """Rows [own expert, row, ...] of all devices that share the width of the experts."""
    return jax.lax.all_gather(rows, exchange.expert_tensor, axis=1, tiled=True) if exchange.expert_tensor else rows


def receive(exchange: Exchange, dispatch: Dispatch, turn: Int[Array, ""] | int, rows: Array) -> Array:
    """The transpose of `send` of pairs: [own expert, row, ...] back where they came from, [T, K, ...].

    Where devices share an expert's width, their rows are summed. Zeros for pairs that are not in this round.
    """
    if exchange.expert_tensor:
        rows = jax.lax.psum_scatter(rows, exchange.expert_tensor, scatter_dimension=1, tiled=True)
    rows = rows.reshape(exchange.own_experts, exchange.num_devices, exchange.rows, *rows.shape[2:])
    rows = jnp.moveaxis(rows, 1, 0)
    if exchange.expert:
        rows = jax.lax.all_to_all(rows, exchange.expert, 0, 0)
    rows = rows.reshape(-1, *rows.shape[3:])
    row = dispatch.places - turn * exchange.rows
    is_here = (row >= 0) & (row < exchange.rows) & (dispatch.experts < exchange.num_experts)
    slot = jnp.where(is_here, dispatch.experts * exchange.rows + row, rows.shape[0])
    found = rows.at[slot].get(mode="fill", fill_value=0)
    return found.reshape(-1, exchange.top_k, *rows.shape[1:])


def receive_tokens(
    exchange: Exchange, dispatch: Dispatch, turn: Int[Array, ""] | int, rows: Array
) -> Float[Array, "T E"]:
    """The transpose of `send` of tokens: float32 sums over their pairs."""
    return jnp.sum(receive(exchange, dispatch, turn, rows), 1, dtype=jnp.float32)

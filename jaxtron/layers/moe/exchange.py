"""Tokens to the experts that they chose and back: what one device does where every mesh axis is manual.

A *pair* is a token with one of its choices. A token goes to *buckets*: an expert is one, or all experts of a device. It
has a row at each bucket with any of its choices, so that a device gets a token once, whichever of its experts it wants.
Rows travel in rounds of a fixed size: in each, a device sends at most `rows` of them to a bucket, for at most `pairs`
pairs. The first round takes nearly all. Further rounds follow only while a device of the group has rows left, so that
shapes are static, memory is that of one round, and however uneven the choices are, nothing is dropped. Both ways are
gathers: by row on the way out, by pair on the way back, each the other's transpose.

Or no row travels: a device gets the tokens of all who share experts with it, and returns sums by token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.grouped_matmul import GroupedProducts
from jaxtron.layers.moe.groups import Groups
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.folding import Axes
from jaxtron.typing import Array, Float, Int


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
    """Whether tokens are gathered, rather than rows sent."""
    rows: int
    """Rows that a device has for one bucket in a round."""
    pairs: int
    """Pairs that these rows are of at most."""
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
    def num_buckets(self) -> int:
        """Buckets that a device's pairs are of."""
        return self.known_experts // self.of_bucket

    @property
    def sends(self) -> bool:
        """Whether rows go to another device."""
        return bool(self.axes) and not self.gathers

    @property
    def has_tokens(self) -> bool:
        """Whether what is laid out by expert are a device's tokens, its own or gathered ones, and no rows of them."""
        return self.grouped is not None and not self.sends

    @property
    def is_free(self) -> bool:
        """Whether what is laid out by expert is there without any work: a device's own tokens."""
        return self.has_tokens and not self.axes


class Dispatch(NamedTuple):
    """Where a device's pairs go; made of the choices alone, once, in the forward."""

    chosen: Int[Array, "T K"]
    """Of a pair, its expert; `known_experts` where it goes nowhere."""
    order: Int[Array, "P"]
    """Pairs by bucket, of each token the first that goes there; those without a row of their own last."""
    places: Int[Array, "P"]
    """A pair's place among those of its bucket; as many as there are pairs where it has no row of its own."""
    starts: Int[Array, "B"]
    """A bucket's first place in `order`."""
    counts: Int[Array, "B"]
    """Its rows."""
    until: Int[Array, "P"] | None
    """Pairs of the rows up to each place of `order`, itself among them; none where they set no bound."""
    further: Int[Array, ""]
    """Whether any of the group needs a second round: 1 or 0."""


class Turn(NamedTuple):
    """One round of it."""

    pairs: Int[Array, "B rows"]
    """Of each row its pair; as many as there are for none."""
    rows: Int[Array, "P"]
    """Of each pair its row; as many as there are where it has none in this round."""
    stop: Int[Array, "B"]
    """The place in each bucket where the next round begins."""
    groups: Groups | None = None
    """How pairs lie where they are multiplied: by expert, in tiles."""


def make_dispatch(exchange: Exchange, chosen: Int[Array, "T K"]) -> Dispatch:
    """Where pairs go for these choices of experts, `num_experts` for none."""
    known, num_buckets = exchange.known_experts, exchange.num_buckets
    if exchange.gathers and exchange.expert:
        chosen = chosen - jax.lax.axis_index(exchange.expert) * known
        chosen = jnp.where((chosen >= 0) & (chosen < known), chosen, known)
    of_pairs, until = chosen // exchange.of_bucket, None
    sizes = jnp.ones_like(chosen)
    if exchange.of_bucket > 1:
        # by pair and pair of the same token
        meets = of_pairs[:, :, None] == of_pairs[:, None]
        sizes = meets.sum(2, dtype=jnp.int32)
        of_pairs = jnp.where(jnp.tril(meets, -1).any(2), num_buckets, of_pairs)
    buckets = of_pairs.reshape(-1)
    order = jnp.argsort(buckets, stable=True).astype(jnp.int32)
    counts = jnp.sum(buckets[:, None] == jnp.arange(num_buckets), 0, dtype=jnp.int32)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    places = jnp.argsort(order).astype(jnp.int32) - starts.at[buckets].get(mode="fill", fill_value=0)
    places = jnp.where(buckets < num_buckets, places, buckets.size)
    if exchange.has_rounds and exchange.of_bucket > 1:
        until = jnp.cumsum(sizes.reshape(-1)[order], dtype=jnp.int32)
    made = Dispatch(chosen, order, places, starts, counts, until, jnp.int32(0))
    return made._replace(further=is_left(exchange, made, _stop(exchange, made, jnp.zeros_like(counts))))


def is_left(exchange: Exchange, dispatch: Dispatch, stop: Int[Array, "B"]) -> Int[Array, ""]:
    """Whether any of the group has rows from these places on: 1 or 0."""
    left = jnp.any(stop < dispatch.counts).astype(jnp.int32)
    # all who meet in a round must come to it: those that share experts, and those that share an expert's width
    return vary(jax.lax.pmax(left, exchange.axes) if exchange.axes and exchange.has_rounds else left)


def _stop(exchange: Exchange, dispatch: Dispatch, first: Int[Array, "B"]) -> Int[Array, "B"]:
    """Where a round that begins at these places of the buckets ends."""
    stop = jnp.minimum(first + exchange.rows, dispatch.counts)
    if dispatch.until is None:
        return stop
    before = dispatch.until.at[dispatch.starts + first - 1].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    fits = jnp.sum(dispatch.until <= (before + exchange.pairs)[:, None], 1, dtype=jnp.int32)
    return jnp.minimum(stop, fits - dispatch.starts)


def make_turn(exchange: Exchange, dispatch: Dispatch, first: Int[Array, "B"]) -> Turn:
    """The round that begins at these places of the buckets."""
    num_pairs, stop = dispatch.order.size, _stop(exchange, dispatch, first)
    place = first[:, None] + jnp.arange(exchange.rows, dtype=jnp.int32)
    pairs = dispatch.order.at[dispatch.starts[:, None] + place].get(mode="fill", fill_value=num_pairs)
    pairs = jnp.where(place < stop[:, None], pairs, num_pairs)
    bucket = dispatch.chosen.reshape(-1) // exchange.of_bucket
    begin, end = (array.at[bucket].get(mode="fill", fill_value=0) for array in (first, stop))
    is_here = (dispatch.places >= begin) & (dispatch.places < end)
    return Turn(pairs, jnp.where(is_here, bucket * exchange.rows + dispatch.places - begin, pairs.size), stop)


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


def send(exchange: Exchange, turn: Turn, *values: Array) -> list[Array]:
    """Of each pair [T, K, ...], or of each token [T, 1, ...], the values at its bucket: [*rows, ...], zeros elsewhere.

    Rows are [own expert, row], or [row] where a bucket is a device: of all devices that send here, and where devices
    share an expert's width, each gets the rows of all.

    Values set out when those before them have come. The largest are last: what is computed meanwhile is beside these,
    where a compiler that is free to choose puts it beside the smallest.
    """
    if exchange.has_tokens:
        return [array[:, 0] for array in values]
    came: list[Array] = []
    for array in values:
        flat = array.reshape(-1, *array.shape[2:])
        rows = flat.at[turn.pairs // (exchange.top_k // array.shape[1])].get(mode="fill", fill_value=0)
        if came and exchange.sends:
            came[-1], rows = jax.lax.optimization_barrier((came[-1], rows))
        came.append(_travel(exchange, rows))
    return came


def _travel(exchange: Exchange, rows: Array) -> Array:
    """Rows by bucket to where these lie."""
    if exchange.sends:
        # [device, own expert, row, ...], or one bucket in the place of experts
        rows = rows.reshape(exchange.num_devices, exchange.own_experts // exchange.of_bucket, *rows.shape[1:])
        if exchange.expert:
            rows = jax.lax.all_to_all(rows, exchange.expert, 0, 0)
        if exchange.expert_tensor:
            # along the leading dimension, where XLA wants it: else all that is kept of rows is laid out like this
            rows = jax.lax.all_gather(rows, exchange.expert_tensor, tiled=True)
        rows = jnp.moveaxis(rows, 1, 0)
        rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return rows if exchange.grouped is None else rows[0]


def send_tokens(
    exchange: Exchange,
    dispatch: Dispatch,
    turn: Turn,
    tokens: Float[Array, "T E"],
    weights: Float[Array, "T K"],
) -> tuple[Float[Array, "*rows E"], Float[Array, "*rows weights"], Int[Array, "*rows K"] | None]:
    """Of each row (as of `send`) its token, the weights of the token's choices, and which of a device's experts these
    are, `own_experts` for none of them.

    Where a bucket is an expert, a row has the weight of its pair and no choices: it is for that expert.
    """
    own = exchange.own_experts
    if exchange.grouped is None:
        of_rows, rows = send(exchange, turn, weights[..., None], tokens[:, None])
        return rows, of_rows, None
    if not exchange.sends:
        is_here = (turn.rows < turn.pairs.size).reshape(dispatch.chosen.shape).any(1, keepdims=True)
        chosen = jnp.where(is_here, dispatch.chosen, own) if exchange.has_rounds else dispatch.chosen
        return tokens, weights, chosen
    # in one message; rows without a token have zeros
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
    asked, rows = send(exchange, turn, jnp.concatenate((dispatch.chosen + 1, bits), 1)[:, None], tokens[:, None])
    chosen = asked[:, : exchange.top_k] - 1
    chosen -= own * jax.lax.axis_index(exchange.expert) if exchange.expert else 0
    chosen = jnp.where((chosen >= 0) & (chosen < own), chosen, own)
    return rows, jax.lax.bitcast_convert_type(asked[:, exchange.top_k :], weights.dtype), chosen


def receive(exchange: Exchange, turn: Turn, rows: Array) -> Array:
    """The transpose of `send` of pairs: [*rows, ...] back where they came from, [T, K, ...].

    Where devices share an expert's width, their rows are summed. Zeros for pairs without a row in this round.
    """
    if exchange.sends:
        rows = rows if exchange.grouped is None else rows[None]
        rows = rows.reshape(rows.shape[0], -1, exchange.rows, *rows.shape[2:])
        rows = jnp.moveaxis(rows, 1, 0)
        if exchange.expert_tensor:
            rows = jax.lax.psum_scatter(rows, exchange.expert_tensor, tiled=True)
        if exchange.expert:
            rows = jax.lax.all_to_all(rows, exchange.expert, 0, 0)
        rows = rows.reshape(*turn.pairs.shape, *rows.shape[3:])
    flat = rows.reshape(-1, *rows.shape[turn.pairs.ndim :])
    found = flat.at[turn.rows].get(mode="fill", fill_value=0)
    return found.reshape(-1, exchange.top_k, *flat.shape[1:])


def receive_tokens(exchange: Exchange, turn: Turn, rows: Array) -> Array:
    """The transpose of `send` of tokens: float32 sums over their rows [T, ...]."""
    if exchange.has_tokens:
        return rows.astype(jnp.float32)
    return jnp.sum(receive(exchange, turn, rows), 1, dtype=jnp.float32)

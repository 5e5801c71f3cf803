"""Attention in plain JAX with memory linear in the sequence: `xla`, for CPUs and for GPUs without a kernel.

The scores exist a tile at a time. Forward keeps a running maximum and sum of each query (online softmax,
FlashAttention, 2205.14135, algorithm 1); backward computes a tile's scores again from the log-sum-exp (its algorithm
4), with five products. Tiles in which nobody attends are not visited.

Arrays are grouped as [B, position, K, G, D], G query heads to a key/value head, so that heads stay one sharded
dimension of an Explicit mesh. Loops start from zeros made of the inputs, which carry their sharding and, in a manual
region, the axes over which they vary.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax, vjp

from jaxtron.kernels import toeplitz
from jaxtron.kernels.attention.dropout import survives
from jaxtron.kernels.attention.spec import AttentionSpec, Feature, Heads, distance_line
from jaxtron.kernels.dropout import drop
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float, Int, UInt32

MOST_QUERIES = 512
MOST_KEYS = 512
# above any score's magnitude, so that it stands for no maximum yet without the -inf - -inf of infinities
LOWEST = -1e38


features: frozenset[Feature] = frozenset(
    {"segments", "soft_cap", "alibi", "distance_bias", "offsets", "deterministic", "dropout", "log_sum_exp"}
)


def unsupported_reason(q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str) -> str | None:
    """None: these features it has on any device, for arrays of any size and type."""
    return None


@dataclass(frozen=True)
class Tiles:
    """How positions are cut: `num_*` blocks of `*_block` positions, of which `queries` and `keys` are real."""

    queries: int
    keys: int
    query_block: int
    key_block: int

    @property
    def num_queries(self) -> int:
        """Blocks of queries."""
        return math.ceil(self.queries / self.query_block)

    @property
    def num_keys(self) -> int:
        """Blocks of keys."""
        return math.ceil(self.keys / self.key_block)

    def pad_queries(self, x: Array, axis: int = 1) -> Array:
        """`x` with zeros after the last query, to whole blocks."""
        return _pad(x, axis, self.num_queries * self.query_block)

    def pad_keys(self, x: Array, axis: int = 1) -> Array:
        """`x` with zeros after the last key, to whole blocks."""
        return _pad(x, axis, self.num_keys * self.key_block)

    def take_queries(self, x: Array, i: Array, axis: int = 1) -> Array:
        """Block `i` of queries."""
        return lax.dynamic_slice_in_dim(x, i * self.query_block, self.query_block, axis)

    def take_keys(self, x: Array, j: Array, axis: int = 1) -> Array:
        """Block `j` of keys."""
        return lax.dynamic_slice_in_dim(x, j * self.key_block, self.key_block, axis)


def cut(num_queries: int, num_keys: int) -> Tiles:
    """Tiles of equal size, as near the largest as whole blocks allow, so that little is padding."""
    query_block, key_block = (
        math.ceil(length / math.ceil(length / most))
        for length, most in ((num_queries, MOST_QUERIES), (num_keys, MOST_KEYS))
    )
    return Tiles(num_queries, num_keys, query_block, key_block)


def forward(
    q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], spec: AttentionSpec
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """What is attended to in `q`'s type, and the log-sum-exp of the scores in float32."""
    q, k, v, spec = vary_alike((q, k, v, spec))
    tiles = cut(q.shape[1], k.shape[1])
    queries, keys, values = tiles.pad_queries(_group(q, k)), tiles.pad_keys(k), tiles.pad_keys(v)
    scoring = _Scoring.of(q, k, spec, tiles)
    first, last = _bounds(scoring.needed())

    def block(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        query = tiles.take_queries(queries, i)

        def tile(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            return _accumulate(carry, query, tiles.take_keys(keys, j), tiles.take_keys(values, j), scoring, i, j)

        heads = query[:, 0, :, :, 0]
        empty, zeros = _zeros(heads, tiles.query_block, v.shape[-1]), _zeros(heads, tiles.query_block)
        out, total, most = lax.fori_loop(first[i], last[i], tile, (empty, zeros, zeros + LOWEST))
        attended = total > 0
        out = out / jnp.where(attended, total, 1)[..., None]
        lse = jnp.where(attended, most + jnp.log(jnp.where(attended, total, 1)), -jnp.inf)
        return None, (out.astype(q.dtype), lse)

    out, lse = lax.scan(block, None, jnp.arange(tiles.num_queries))[1]
    # from [blocks, B, K, G, position, V] and [blocks, B, K, G, position]: heads by themselves, as they may be sharded
    out = _merge(jnp.transpose(out, (1, 0, 4, 2, 3, 5)), 1)[:, : tiles.queries]
    lse = _merge(jnp.transpose(lse, (1, 2, 3, 0, 4)), 3)[..., : tiles.queries]
    return _merge(out, 2), _merge(lse, 1)


def _accumulate(
    carry: tuple[Array, Array, Array], query: Array, key: Array, value: Array, scoring: "_Scoring", i: Array, j: Array
) -> tuple[Array, Array, Array]:
    """The unnormalized output, its sum of exponentials and its maximum, with one more tile of keys."""
    out, total, most = carry
    scores, _ = scoring.scores(query, key, i, j)
    attends = scoring.attends(i, j)
    scores = jnp.where(attends, scores, LOWEST)
    higher = jnp.maximum(most, scores.max(-1))
    weights = jnp.where(attends, jnp.exp(scores - higher[..., None]), 0)
    fade = jnp.exp(most - higher)
    # the sum of the softmax is of all of them
    kept = scoring.dropped(weights, i, j)
    mixed = _product("bkgst,btkv->bkgsv", kept.astype(value.dtype), value)
    return out * fade[..., None] + mixed, total * fade + weights.sum(-1), higher


def backward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    dout: Float[Array, "B S H V"],
    spec: AttentionSpec,
) -> tuple[Array, ...]:
    """Gradients of queries, keys, values in their types, and of a bias by distance, given `delta = sum(dout * out) -
    dlse`."""
    q, k, v, lse, delta, dout, spec = vary_alike((q, k, v, lse, delta, dout, spec))
    tiles = cut(q.shape[1], k.shape[1])
    queries, keys, values = tiles.pad_queries(_group(q, k)), tiles.pad_keys(k), tiles.pad_keys(v)
    douts = tiles.pad_queries(_group(dout, k))
    heads = (q.shape[0], k.shape[2], -1, q.shape[1])
    # rows with nothing to attend to are masked everywhere: any finite number serves
    lses = tiles.pad_queries(jnp.where(lse == -jnp.inf, 0, lse).reshape(heads), 3)
    deltas = tiles.pad_queries(delta.reshape(heads), 3)
    scoring = _Scoring.of(q, k, spec, tiles)
    first, last = _bounds(scoring.needed().T)

    def block(sums: tuple[Array, Array | None], j: Array) -> tuple[tuple[Array, Array | None], tuple[Array, Array]]:
        key, value = tiles.take_keys(keys, j), tiles.take_keys(values, j)

        def tile(i: Array, carry: tuple) -> tuple:
            dquery, dline, dkey, dvalue = carry
            query, dout = (tiles.take_queries(x, i) for x in (queries, douts))
            lse, delta = (tiles.take_queries(x, i, 3) for x in (lses, deltas))
            rows = _Rows(query, dout, lse, delta)
            part, dkey_part, dvalue_part, dscores = _tile_gradients(rows, key, value, scoring, i, j)
            part = part + tiles.take_queries(dquery, i)
            dquery = lax.dynamic_update_slice_in_dim(dquery, part, i * tiles.query_block, 1)
            if dline is not None:
                dline = scoring.add_diagonals(dline, dscores, i, j)
            return dquery, dline, dkey + dkey_part, dvalue + dvalue_part

        zeros = jnp.zeros_like(key, jnp.float32), jnp.zeros_like(value, jnp.float32)
        dquery, dline, dkey, dvalue = lax.fori_loop(first[j], last[j], tile, (*sums, *zeros))
        return (dquery, dline), (dkey.astype(k.dtype), dvalue.astype(v.dtype))

    sums = jnp.zeros_like(queries, jnp.float32), None if scoring.line is None else jnp.zeros_like(scoring.line)
    (dquery, dline), (dkey, dvalue) = lax.scan(block, sums, jnp.arange(tiles.num_keys))
    dquery = _merge(dquery[:, : tiles.queries].astype(q.dtype), 2)
    dkey, dvalue = (_merge(jnp.moveaxis(gradient, 0, 1), 1)[:, : tiles.keys] for gradient in (dkey, dvalue))
    if dline is None:
        return dquery, dkey, dvalue
    return dquery, dkey, dvalue, *vjp(lambda table: _line(table, k, spec, tiles), spec.distance_bias)[1](dline)


class _Rows(NamedTuple):
    """A block of queries in the backward, with what the forward and its users say of them."""

    query: Float[Array, "B S K G D"]
    dout: Float[Array, "B S K G V"]
    lse: Float[Array, "B K G S"]
    delta: Float[Array, "B K G S"]


def _tile_gradients(
    rows: _Rows, key: Array, value: Array, scoring: "_Scoring", i: Array, j: Array
) -> tuple[Array, Array, Array, Array]:
    """One tile's part of the gradients of its queries, keys and values, and its scores' gradients, in float32."""
    scores, slope = scoring.scores(rows.query, key, i, j)
    attends = scoring.attends(i, j)
    weights = jnp.where(attends, jnp.exp(scores - rows.lse[..., None]), 0)
    dvalue = _product("bkgst,bskgv->btkv", scoring.dropped(weights, i, j).astype(rows.dout.dtype), rows.dout)
    dweights = scoring.dropped(_product("bskgv,btkv->bkgst", rows.dout, value), i, j)
    dscores = jnp.where(attends, weights * (dweights - rows.delta[..., None]), 0)
    # of q . k: through the cap and the scale
    dproduct = (dscores * slope).astype(key.dtype)
    dquery = _product("bkgst,btkd->bskgd", dproduct, key)
    dkey = _product("bkgst,bskgd->btkd", dproduct, rows.query)
    return dquery, dkey, dvalue, dscores


@dataclass(frozen=True)
class _Scoring:
    """Scores of one tile, and who attends in it."""

    spec: AttentionSpec
    tiles: Tiles
    factor: float
    q_segments: Int[Array, "B S"] | None
    kv_segments: Int[Array, "B T"] | None
    slopes: Float[Array, "K G"] | None
    line: Float[Array, "K G L"] | None
    """The bias of each distance between a query and a key, padding included, in order."""
    seeds: UInt32[Array, "B K G 2"] | None

    @classmethod
    def of(cls, q: Array, k: Array, spec: AttentionSpec, tiles: Tiles) -> "_Scoring":
        q_segments, kv_segments = spec.q_segment_ids, spec.kv_segment_ids
        return cls(
            spec,
            tiles,
            spec.scale(q.shape[-1]),
            None if q_segments is None else tiles.pad_queries(q_segments),
            None if kv_segments is None else tiles.pad_keys(kv_segments),
            None if spec.alibi_slopes is None else spec.alibi_slopes.astype(jnp.float32).reshape(k.shape[2], -1),
            None if spec.distance_bias is None else _line(spec.distance_bias, k, spec, tiles),
            None if spec.dropout_seeds is None else spec.dropout_seeds.reshape(q.shape[0], k.shape[2], -1, 2),
        )

    def positions(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Indices [query, 1] and [1, key] of tile (i, j), from 0."""
        queries = i * self.tiles.query_block + jnp.arange(self.tiles.query_block)[:, None]
        keys = j * self.tiles.key_block + jnp.arange(self.tiles.key_block)[None, :]
        return queries, keys

    def scores(self, query: Array, key: Array, i: Array, j: Array) -> tuple[Array, Array | float]:
        """Scores [B, K, G, query, key] of tile (i, j) before masking, and their derivative by q . k."""
        scores = _product("bskgd,btkd->bkgst", query, key) * self.factor
        derivative: Array | float = self.factor
        if self.spec.logits_soft_cap is not None:
            turned = jnp.tanh(scores / self.spec.logits_soft_cap)
            scores, derivative = self.spec.logits_soft_cap * turned, self.factor * (1 - turned**2)
        if self.slopes is not None:
            queries, keys = self.positions(i, j)
            distance = (keys + self.spec.kv_offset) - (queries + self.spec.q_offset)
            scores = scores + self.slopes[:, :, None, None] * distance
        if self.line is not None:
            length = self.tiles.query_block + self.tiles.key_block - 1
            own = lax.dynamic_slice_in_dim(self.line, self._first_diagonal(i, j), length, 2)
            scores = scores + toeplitz.matrix(own, self.tiles.query_block)
        return scores, derivative

    def add_diagonals(
        self, dline: Float[Array, "K G L"], dscores: Float[Array, "B K G S T"], i: Array, j: Array
    ) -> Float[Array, "K G L"]:
        """The bias' gradients by distance with those of tile (i, j)."""
        found = toeplitz.diagonals(dscores.sum(0))
        start = self._first_diagonal(i, j)
        found = found + lax.dynamic_slice_in_dim(dline, start, found.shape[2], 2)
        return lax.dynamic_update_slice_in_dim(dline, found, start, 2)

    def _first_diagonal(self, i: Array, j: Array) -> Array:
        """Where the line has the distance between the last query and the first key of tile (i, j)."""
        return j * self.tiles.key_block + (self.tiles.num_queries - 1 - i) * self.tiles.query_block

    def dropped(self, x: Float[Array, "B K G S T"], i: Array, j: Array) -> Float[Array, "B K G S T"]:
        """Weights of tile (i, j), or their gradients, without those that are dropped."""
        rate = self.spec.dropout_rate
        if self.seeds is None or not rate:
            return x
        queries, keys = self.positions(i, j)
        first, second = (self.seeds[..., word, None, None] for word in range(2))
        places = queries + self.spec.q_offset, keys + self.spec.kv_offset
        return drop(x, survives(*places, (first, second), rate), rate)

    def attends(self, i: Array, j: Array) -> Bool[Array, "#B 1 1 S T"]:
        """True where a query of tile (i, j) attends to a key of it."""
        queries, keys = self.positions(i, j)
        attends = (queries < self.tiles.queries) & (keys < self.tiles.keys)
        distance = (queries + self.spec.q_offset) - (keys + self.spec.kv_offset)
        if self.spec.causal:
            attends &= distance >= 0
        if self.spec.window is not None:
            attends &= jnp.abs(distance) < self.spec.window
        attends = attends[None, None, None]
        if self.q_segments is not None and self.kv_segments is not None:
            q_segments = self.tiles.take_queries(self.q_segments, i)[:, None, None, :, None]
            kv_segments = self.tiles.take_keys(self.kv_segments, j)[:, None, None, None, :]
            attends &= q_segments == kv_segments
        return attends

    def needed(self) -> Bool[Array, "I J"]:
        """False for a tile (i, j) in which surely nobody attends, whatever its row."""
        tiles, spec = self.tiles, self.spec
        first_query = spec.q_offset + jnp.arange(tiles.num_queries)[:, None] * tiles.query_block
        first_key = spec.kv_offset + jnp.arange(tiles.num_keys)[None, :] * tiles.key_block
        farthest = first_query + (tiles.query_block - 1) - first_key
        nearest = first_query - (first_key + (tiles.key_block - 1))
        needed = jnp.ones((tiles.num_queries, tiles.num_keys), bool)
        if spec.causal:
            needed &= farthest >= 0
        if spec.window is not None:
            needed &= (nearest < spec.window) & (farthest > -spec.window)
        if spec.q_segment_ids is not None and spec.kv_segment_ids is not None:
            lowest_q, highest_q = _extremes(spec.q_segment_ids, tiles.query_block)
            lowest_kv, highest_kv = _extremes(spec.kv_segment_ids, tiles.key_block)
            meets = (lowest_q[:, :, None] <= highest_kv[:, None, :]) & (lowest_kv[:, None, :] <= highest_q[:, :, None])
            needed &= meets.any(0)
        return needed


def _line(table: Float[Array, "H N"], k: Array, spec: AttentionSpec, tiles: Tiles) -> Float[Array, "K G L"]:
    """Of all distances between positions of whole tiles, by the key/value head."""
    sizes = tiles.num_queries * tiles.query_block, tiles.num_keys * tiles.key_block
    line = distance_line(replace(spec, distance_bias=table), *sizes)
    return line.reshape(k.shape[2], -1, line.shape[1])


def _extremes(segments: Int[Array, "B S"], block: int) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """Lowest and highest segment of each block."""
    rows, length = segments.shape
    blocks = jnp.pad(segments, ((0, 0), (0, -length % block)), mode="edge").reshape(rows, -1, block)
    return blocks.min(-1), blocks.max(-1)


def _bounds(needed: Bool[Array, "I J"]) -> tuple[Int[Array, " I"], Int[Array, " I"]]:
    """Each row's first needed column, and the one after its last; equal where none is."""
    first = jnp.argmax(needed, 1)
    last = needed.shape[1] - jnp.argmax(needed[:, ::-1], 1)
    return first, jnp.where(needed.any(1), last, first)


def _group(x: Float[Array, "B S H D"], k: Float[Array, "B T K C"]) -> Float[Array, "B S K G D"]:
    """Query heads by the key/value head that they read."""
    rows, length, _, dim = x.shape
    return x.reshape(rows, length, k.shape[2], -1, dim)


def _merge(x: Array, axis: int) -> Array:
    """`x` with this axis and the next as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _zeros(like: Float[Array, "B K G"], *sizes: int) -> Array:
    """Float32 zeros [B, K, G, *sizes], sharded and varying as `like` is."""
    zeros = jnp.zeros_like(like, jnp.float32)
    return jnp.broadcast_to(zeros[(..., *(None for _ in sizes))], (*like.shape, *sizes))


def _pad(x: Array, axis: int, length: int) -> Array:
    after = [(0, 0)] * x.ndim
    after[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, after)


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

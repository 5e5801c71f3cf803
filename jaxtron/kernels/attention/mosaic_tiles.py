"""Which tiles of scores the Mosaic kernels visit, and which scores inside a tile count."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxtron.kernels.attention import dropout
from jaxtron.kernels.attention.mosaic_dropout import tile_survives
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.dropout import scale
from jaxtron.kernels.mosaic import COLUMNS, ROWS, Refs, Target, spread
from jaxtron.typing import Array, Int

LOG2_E = math.log2(math.e)
# of a range: first tile, end, first and end of those inside it of which every score counts
START, END, WHOLE_START, WHOLE_END = range(4)

Masked = bool | Callable[[Any], Any]


@dataclass(frozen=True)
class Scoring:
    """The static half of an `AttentionSpec`, as the kernels use it; `keys` is the number of keys before padding."""

    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    biased: bool
    segmented: bool
    dropout: float
    """Part of the weights that is dropped."""
    keys: int
    padded: bool
    """Whether keys of the padding must be told by their number."""

    @classmethod
    def of(cls, spec: AttentionSpec, scale: float, keys: int, block_keys: int) -> "Scoring":
        """What `spec` means for scores of `scale` and keys in tiles of `block_keys`."""
        return cls(
            causal=spec.causal,
            window=spec.window,
            soft_cap=spec.logits_soft_cap,
            scale=scale,
            biased=spec.alibi_slopes is not None,
            segmented=spec.q_segment_ids is not None,
            dropout=0.0 if spec.dropout_seeds is None else spec.dropout_rate,
            keys=keys,
            # with segments those of the padding do
            padded=keys % block_keys > 0 and spec.q_segment_ids is None,
        )

    @property
    def weight_scale(self) -> float:
        """Factor of the weights that are not dropped, which what is summed with them gets at the end."""
        return scale(self.dropout)

    @property
    def gradient_scale(self) -> float:
        """The factor that sums of scores' gradients get at the end: of scores, and of weights (`delta` lacks it)."""
        return self.scale * self.weight_scale

    @property
    def positional(self) -> bool:
        """Whether it depends on positions who attends to whom."""
        return self.causal or self.window is not None

    @property
    def masked(self) -> bool:
        """Whether any tile may hold scores that do not count."""
        return self.positional or self.segmented or self.padded

    @property
    def plain(self) -> bool:
        """Whether scores are products up to a positive factor."""
        return self.soft_cap is None and not self.biased and self.scale > 0

    def pieces(self, bounds: tuple[Any, Any, Any, Any], *, once: bool) -> list[tuple[Any, Any, Masked]]:
        """Loops that make up one range of tiles, as (first, end, whether to mask, or which tiles to mask).

        `once`: one loop that asks, which takes fewer registers.
        """
        start, end, whole_start, whole_end = bounds
        if not self.masked:
            return [(start, end, False)]
        if once:
            return [(start, end, lambda tile: (tile < whole_start) | (tile >= whole_end))]
        before, after = (start, whole_start, True), (whole_end, end, True)
        middle = (whole_start, whole_end, False)
        # without windows and segments what is cut is at the end of the keys
        return [before, middle, after] if self.window is not None or self.segmented else [middle, after]


def inputs_of(spec: AttentionSpec) -> dict[str, Array | None]:
    """What every kernel reads of a spec: position of the first query less that of the first key, and its arrays.

    Where weights are dropped also these two positions, multiples of 16.
    """
    starts = [jnp.asarray(offset, jnp.int32) for offset in (spec.q_offset, spec.kv_offset)]
    given = [offset for offset in (spec.q_offset, spec.kv_offset) if isinstance(offset, int)]
    drops = spec.dropout_seeds is not None and spec.dropout_rate > 0
    assert not drops or not any(offset % dropout.ALIGNMENT for offset in given), given
    return {
        "shift": (starts[0] - starts[1])[None],
        "starts": jnp.stack(starts) if drops else None,
        "seeds": spec.dropout_seeds if drops else None,
        "slopes": spec.alibi_slopes,
        "q_segments": spec.q_segment_ids,
        "kv_segments": spec.kv_segment_ids,
    }


def visits(
    spec: AttentionSpec, scoring: Scoring, queries: int, keys: int, tile: tuple[int, int]
) -> Int[Array, "rows Q 4"]:
    """For each row of the batch (one for all without segments) and tile of queries: its range of tiles of keys."""
    visible, whole = _tiles(spec, scoring, queries, keys, tile)
    return _ranges(visible, whole)


def visitors(
    spec: AttentionSpec, scoring: Scoring, queries: int, keys: int, tile: tuple[int, int]
) -> Int[Array, "rows K 4"]:
    """For each row of the batch (one for all without segments) and tile of keys: its range of tiles of queries."""
    visible, whole = _tiles(spec, scoring, queries, keys, tile)
    return _ranges(visible.swapaxes(1, 2), whole.swapaxes(1, 2))


def _tiles(
    spec: AttentionSpec, scoring: Scoring, queries: int, keys: int, tile: tuple[int, int]
) -> tuple[Array, Array]:
    """[rows, query tiles, key tiles]: does any score of the tile count (it may say yes for none), and do all."""
    block_queries, block_keys = tile
    first_query = jnp.arange(math.ceil(queries / block_queries), dtype=jnp.int32)[:, None] * block_queries
    first_key = jnp.arange(math.ceil(keys / block_keys), dtype=jnp.int32)[None, :] * block_keys
    # positions of padding count for nothing: the last tile is as long as what is in it
    last_query = jnp.minimum(first_query + block_queries, queries) - 1
    last_key = jnp.minimum(first_key + block_keys, keys) - 1
    shift = jnp.asarray(spec.q_offset, jnp.int32) - jnp.asarray(spec.kv_offset, jnp.int32)
    nearest, farthest = first_query - last_key + shift, last_query - first_key + shift
    visible = jnp.ones((first_query.shape[0], first_key.shape[1]), bool)
    whole = visible & (first_key + block_keys <= keys)
    if scoring.causal:
        visible, whole = visible & (farthest >= 0), whole & (nearest >= 0)
    if scoring.window is not None:
        visible, whole = visible & (nearest < scoring.window), whole & (farthest < scoring.window)
        if not scoring.causal:
            visible, whole = visible & (farthest > -scoring.window), whole & (nearest > -scoring.window)
    visible, whole = visible[None], whole[None]
    if scoring.segmented:
        low_query, high_query = (ends[:, :, None] for ends in _extremes(spec.q_segment_ids, queries, block_queries))
        low_key, high_key = (ends[:, None, :] for ends in _extremes(spec.kv_segment_ids, keys, block_keys))
        visible &= (low_query <= high_key) & (low_key <= high_query)
        whole &= (low_query == high_key) & (low_key == high_query)
    return visible, whole & visible


def _extremes(segments: Any, length: int, block: int) -> tuple[Array, Array]:
    """[rows, tiles]: the least and the greatest segment of each tile of the first `length`."""
    whole = jnp.pad(segments[:, :length], ((0, 0), (0, -length % block)), mode="edge")
    tiles = whole.reshape(segments.shape[0], -1, block)
    return tiles.min(axis=2), tiles.max(axis=2)


def _ranges(visible: Array, whole: Array) -> Array:
    """[rows, tiles, 4]: first and end of the visible ones of the last axis, and of the first run of whole ones.

    A run without a tile lies before all of them.
    """
    count = visible.shape[-1]
    number = jnp.arange(count, dtype=jnp.int32)
    start = jnp.min(jnp.where(visible, number, count), axis=-1)
    end = jnp.max(jnp.where(visible, number + 1, 0), axis=-1)
    start = jnp.minimum(start, end)
    whole_start = jnp.min(jnp.where(whole, number, count), axis=-1)
    broken = ~whole & (number >= whole_start[..., None])
    whole_end = jnp.min(jnp.where(broken, number, count), axis=-1)
    none = whole_start >= count
    whole_start = jnp.where(none, start, whole_start)
    whole_end = jnp.where(none, start, whole_end)
    return jnp.stack([start, end, whole_start, whole_end], axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Tile:
    """One tile of scores in a kernel: where it is, and whether its rows are queries or (transposed) keys."""

    target: Target
    scoring: Scoring
    first_query: Any
    first_key: Any
    shift: Any
    """Position of the first query less that of the first key."""
    segments: tuple[Any, Any] | None
    """Segment numbers of its queries and of its keys, references to vectors."""
    keys_are_rows: bool

    def distance(self, shape: tuple[int, ...]) -> Array:
        """Query position - key position."""
        query_axis = 1 if self.keys_are_rows else 0
        queries, keys = self.target.iota(shape, query_axis), self.target.iota(shape, 1 - query_axis)
        return (queries - keys) + (self.first_query - self.first_key + self.shift)

    def survives(self, shape: tuple[int, ...], refs: Refs, row: Any, head: Any) -> Array | None:
        """True where a weight of this row's query head stays; none: all do."""
        rate = self.scoring.dropout
        if not rate:
            return None
        seeds = refs.seeds[row, head, 0], refs.seeds[row, head, 1]
        starts = self.first_query + refs.starts[0], self.first_key + refs.starts[1]
        if not self.target.interpret:
            return tile_survives(shape, starts, seeds, rate, keys_are_rows=self.keys_are_rows)
        query_axis = 1 if self.keys_are_rows else 0
        queries, keys = (self.target.iota(shape, axis) for axis in (query_axis, 1 - query_axis))
        return dropout.survives(queries + starts[0], keys + starts[1], seeds, rate)

    def masked(self, scores: Array, which: Masked, number: Any) -> Array:
        """`mask` if `which` says so of tile `number`."""
        if callable(which):
            return lax.cond(which(number), self.mask, lambda scores: scores, scores)
        return self.mask(scores) if which else scores

    def mask(self, scores: Array) -> Array:
        """-inf where a score does not count, one condition after the other: fewer registers than all at once."""
        scoring, shape = self.scoring, scores.shape
        query_axis = 1 if self.keys_are_rows else 0
        if scoring.positional:
            distance = self.distance(shape)
            if scoring.causal:
                scores = _where(distance >= 0, scores)
            if scoring.window is not None:
                scores = _where(distance < scoring.window, scores)
                if not scoring.causal:
                    scores = _where(distance > -scoring.window, scores)
        if scoring.padded:
            scores = _where(self.target.iota(shape, 1 - query_axis) < scoring.keys - self.first_key, scores)
        if self.segments is not None:
            layouts = (ROWS, COLUMNS)
            queries = self.target.load(self.segments[0], layouts[query_axis])
            keys = self.target.load(self.segments[1], layouts[1 - query_axis])
            same = spread(queries, shape, query_axis) == spread(keys, shape, 1 - query_axis)
            scores = _where(same, scores)
        return scores

    def scores(self, products: Array, slope: Any) -> tuple[Array, float, Array | None]:
        """Scores in units of log 2 up to the factor that is returned, and the derivative by the product if not 1.

        The factor is left out where it can be part of a multiply-add later.
        """
        scoring = self.scoring
        if scoring.plain:
            return products, scoring.scale * LOG2_E, None
        slopes = None
        if scoring.soft_cap is None:
            scores = products * (scoring.scale * LOG2_E)
        else:
            bent = jnp.tanh(products * (scoring.scale / scoring.soft_cap))
            slopes = 1.0 - bent * bent
            scores = bent * (scoring.soft_cap * LOG2_E)
        if scoring.biased:
            scores = scores - (slope * LOG2_E) * self.distance(products.shape).astype(jnp.float32)
        return scores, 1.0, slopes


def _where(counts: Array, scores: Array) -> Array:
    return jnp.where(counts, scores, -jnp.inf)


def select(bounds: Any, row: Any, tile: Any) -> tuple[Any, Any, Any, Any]:
    """The four numbers of a tile's range, read from global memory; `row` is 0 where one row holds for all."""
    row = jnp.int32(0) if bounds.shape[0] == 1 else row
    # inside a `jax.shard_map` what is read has a type that varies, and what loops make of it has not; a sum has none
    start, end, whole_start, whole_end = (lax.add(bounds[row, tile, part], jnp.int32(0)) for part in range(4))
    return start, end, whole_start, whole_end


def rounded(size: int, multiple: int) -> int:
    """`size` up to a multiple."""
    return math.ceil(size / multiple) * multiple

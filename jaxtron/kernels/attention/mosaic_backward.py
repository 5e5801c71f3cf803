"""Flash attention backward on Hopper by tiles of keys (2307.08691, algorithm 2; 2407.08608, section 3).

A block keeps one tile of keys of one key/value head and walks over the tiles of queries of every query head that reads
it, so dK and dV are summed in registers. Scores are transposed (keys are rows), and what the next product takes on its
left stays in registers. Five products make all three gradients: dQ's part of each tile is added to float32 in global
memory by TMA, in whatever order blocks come. Without dQ (`Wanted`) the result is the same bit for bit every time.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtron.kernels.attention.mosaic_tiles import Masked, Scoring, Tile, inputs_of, select, visitors
from jaxtron.kernels.attention.spec import AttentionSpec, most_pairs
from jaxtron.kernels.mosaic import (
    COLUMNS,
    WARPGROUP_ROWS,
    Refs,
    Registers,
    Target,
    run_kernel,
    spread,
    swizzled,
    transposed,
    unhoisted,
)
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Float

WARPGROUPS = 2
BLOCK_KEYS = WARPGROUPS * WARPGROUP_ROWS
BLOCK_QUERIES = 64
_REGISTERS = Registers(WARPGROUPS, memory=24)


@dataclass(frozen=True)
class Wanted:
    """Which gradients a kernel makes."""

    dq: bool
    dk: bool
    dv: bool

    @property
    def ds(self) -> bool:
        """Whether it needs the gradient of the scores."""
        return self.dq or self.dk

    def width(self, head_dim: int, value_dim: int) -> int:
        """Multiply-adds for a pair of a query and a key: the score again, the gradient's, and what is wanted."""
        return head_dim * (1 + self.dq + self.dk) + value_dim * (self.dv + self.ds)


@dataclass(frozen=True)
class _Block:
    """Where a warpgroup is."""

    row: Any
    head: Any
    tile: Any
    warpgroup: Any

    @property
    def first_key(self) -> Any:
        """Its first key."""
        return self.tile * BLOCK_KEYS + self.warpgroup * WARPGROUP_ROWS

    @property
    def rows(self) -> Any:
        """Its rows of a tile of keys in shared memory."""
        return pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def backward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    dout: Float[Array, "B S H V"],
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    spec: AttentionSpec,
    sizes: tuple[int, int],
    scale: float,
    wanted: Wanted,
    target: Target,
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients that are wanted (dq in float32), of padded inputs of which `sizes` queries and keys count.

    `lse` is in units of log 2, and +inf for queries that attend to nothing or are padding.
    """
    (rows, _, _, head_dim), (_, keys, heads, value_dim) = q.shape, v.shape
    scoring = Scoring.of(spec, scale, sizes[1], BLOCK_KEYS)
    tiles = keys // BLOCK_KEYS
    total = None
    if wanted.dq:
        total = jax.new_ref(jnp.zeros(q.shape, jnp.float32))
    made = run_kernel(
        lambda refs: _run(refs, scoring, wanted, target),
        inputs={
            "bounds": visitors(spec, scoring, sizes[0], sizes[1], (BLOCK_QUERIES, BLOCK_KEYS)),
            **inputs_of(spec),
            "q": q,
            "k": k,
            "v": v,
            "dout": dout,
            "lse": lse,
            "delta": delta,
            "dq": total,
        },
        outputs={
            "dk": jax.ShapeDtypeStruct(k.shape, k.dtype) if wanted.dk else None,
            "dv": jax.ShapeDtypeStruct(v.shape, v.dtype) if wanted.dv else None,
        },
        scratch=_scratch(q.dtype, head_dim, value_dim, wanted),
        grid={"head": heads, "tile": tiles, "row": rows},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name="attention_backward",
        flops=2 * rows * q.shape[2] * most_pairs(spec, *sizes) * wanted.width(head_dim, value_dim),
    )
    # like a kernel's outputs (`run_kernel`)
    dq = None if total is None else vary_alike((total[...], q))[0]
    return dq, made.get("dk"), made.get("dv")


def _scratch(dtype: Any, head_dim: int, value_dim: int, wanted: Wanted) -> dict[str, Any]:
    """Shared memory and barriers, in the order of `Refs`."""
    stages = 2 if max(head_dim, value_dim) <= 192 else 1
    # each warpgroup makes half of dQ's columns, and what it multiplies must be whole tiles of the swizzle
    narrow = wanted.dq and head_dim // WARPGROUPS * jnp.dtype(dtype).itemsize < 128
    swizzle = functools.partial(swizzled, dtype, widest=64 if narrow else 128)
    share = head_dim // WARPGROUPS
    tile = functools.partial(plgpu.SMEM, dtype=dtype)
    statistics = plgpu.SMEM((stages, BLOCK_QUERIES), jnp.float32)
    across = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    copies = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    sums = (WARPGROUPS, BLOCK_QUERIES, share)
    return {
        "k_shared": tile((BLOCK_KEYS, head_dim), transforms=swizzle(head_dim)),
        "v_shared": tile((BLOCK_KEYS, value_dim), transforms=swizzled(dtype, value_dim)),
        "q_shared": tile((stages, BLOCK_QUERIES, head_dim), transforms=swizzle(head_dim)),
        "dout_shared": tile((stages, BLOCK_QUERIES, value_dim), transforms=swizzled(dtype, value_dim)),
        "lse_shared": statistics,
        "delta_shared": statistics,
        "ds_shared": tile((2, BLOCK_KEYS, BLOCK_QUERIES), transforms=swizzle(BLOCK_QUERIES)) if wanted.dq else None,
        "dq_shared": plgpu.SMEM(sums, jnp.float32, transforms=swizzled(jnp.float32, share)) if wanted.dq else None,
        "kv_ready": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        "q_ready": copies,
        "dout_ready": copies,
        "q_free": across,
        "dout_free": across,
        "meeting": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }


def _run(refs: Refs, scoring: Scoring, wanted: Wanted, target: Target) -> None:
    """One tile of keys of one head."""
    block = _Block(*(lax.axis_index(name) for name in ("row", "head", "tile", "warpgroup")))
    bounds = select(refs.bounds, block.row, block.tile)

    @pl.when(block.warpgroup < WARPGROUPS)
    def _() -> None:
        target.registers(_REGISTERS, memory=False)
        _compute(refs, scoring, wanted, target, block, bounds)

    @pl.when(block.warpgroup == WARPGROUPS)
    def _() -> None:
        target.registers(_REGISTERS, memory=True)
        _copy_queries(refs, block, bounds)


def _group(refs: Refs) -> int:
    """Query heads per key/value head."""
    return refs.q.shape[2] // refs.k.shape[2]


def _stages(refs: Refs) -> int:
    """Tiles of queries in shared memory."""
    return refs.q_shared.shape[0]


def _step_of(refs: Refs, block: _Block, start: Any, index: Any) -> tuple[Any, Any]:
    """Tile of queries and query head of a step: all heads of the group, then the next tile."""
    group = jnp.int32(_group(refs))
    return start + lax.div(index, group), block.head * group + lax.rem(index, group)


def _copy_queries(refs: Refs, block: _Block, bounds: Any) -> None:
    """Keeps the stages full of queries, gradients of the output and their statistics."""
    start, end, *_ = bounds
    steps = (end - start) * _group(refs)

    def step(index: Any, _: None) -> None:
        slot = lax.rem(index, jnp.int32(_stages(refs)))
        tile, head = _step_of(refs, block, start, index)
        queries = pl.ds(tile * BLOCK_QUERIES, BLOCK_QUERIES)
        for matrix, shared, vector, vector_shared, ready, free in (
            (refs.q, refs.q_shared, refs.lse, refs.lse_shared, refs.q_ready, refs.q_free),
            (refs.dout, refs.dout_shared, refs.delta, refs.delta_shared, refs.dout_ready, refs.dout_free),
        ):
            pl.when(index >= _stages(refs))(functools.partial(plgpu.barrier_wait, free.at[slot]))
            plgpu.copy_gmem_to_smem(matrix.at[block.row, queries, head], shared.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(vector.at[block.row, head, queries], vector_shared.at[slot], ready.at[slot])

    def drain(index: Any, _: None) -> None:
        slot = lax.rem(index, jnp.int32(_stages(refs)))
        plgpu.barrier_wait(refs.q_free.at[slot])
        plgpu.barrier_wait(refs.dout_free.at[slot])

    lax.fori_loop(0, steps, step, None)
    # a block ends only when every arrival was seen
    lax.fori_loop(lax.max(steps - _stages(refs), jnp.int32(0)), steps, drain, None)


def _compute(refs: Refs, scoring: Scoring, wanted: Wanted, target: Target, block: _Block, bounds: Any) -> None:
    """64 keys: the loop over queries, then dK and dV."""
    keys, ready = pl.ds(block.first_key, WARPGROUP_ROWS), refs.kv_ready.at[block.warpgroup]
    k_shared, v_shared = refs.k_shared.at[block.rows], refs.v_shared.at[block.rows]
    plgpu.copy_gmem_to_smem(refs.k.at[block.row, keys, block.head], k_shared, ready)
    plgpu.copy_gmem_to_smem(refs.v.at[block.row, keys, block.head], v_shared, ready)
    plgpu.barrier_wait(ready)
    carry = tuple(
        target.full((WARPGROUP_ROWS, shared.shape[1]), 0.0) if there else None
        for shared, there in ((k_shared, wanted.dk), (v_shared, wanted.dv))
    )
    start = bounds[0]
    for first, end, masked in scoring.pieces(bounds, once=True):
        step = functools.partial(_step, refs, scoring, wanted, target, block, start, masked)
        carry = lax.fori_loop((first - start) * _group(refs), (end - start) * _group(refs), step, carry)
    dk, dv = carry
    if wanted.dq:
        # the other warpgroup reads these keys for its last part of dQ
        plgpu.wait_smem_to_gmem(0)
        _meet(refs)
    of_keys, of_values = scoring.gradient_scale, scoring.weight_scale
    for made, factor, shared, out in ((dk, of_keys, k_shared, refs.dk), (dv, of_values, v_shared, refs.dv)):
        if made is not None:
            shared[...] = (made * factor).astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared, out.at[block.row, keys, block.head])
    plgpu.wait_smem_to_gmem(0)


def _meet(refs: Refs) -> None:
    """Both warpgroups wait for each other."""
    plgpu.barrier_arrive(refs.meeting)
    plgpu.barrier_wait(refs.meeting)


def _step(
    refs: Refs,
    scoring: Scoring,
    wanted: Wanted,
    target: Target,
    block: _Block,
    start: Any,
    masked: Masked,
    index: Any,
    carry: tuple[Any, Any],
) -> tuple[Any, Any]:
    """One tile of queries of one head."""
    dk, dv = carry
    block = dataclasses.replace(block, warpgroup=block.warpgroup + unhoisted(index))
    slot = lax.rem(index, jnp.int32(_stages(refs)))
    number, head = _step_of(refs, block, start, index)
    first_query = number * BLOCK_QUERIES
    segments = None
    if scoring.segmented:
        segments = (
            refs.q_segments.at[block.row, pl.ds(first_query, BLOCK_QUERIES)],
            refs.kv_segments.at[block.row, pl.ds(block.first_key, WARPGROUP_ROWS)],
        )
    tile = Tile(target, scoring, first_query, block.first_key, refs.shift[0], segments, keys_are_rows=True)
    q, dout = refs.q_shared.at[slot], refs.dout_shared.at[slot]
    plgpu.barrier_wait(refs.q_ready.at[slot])
    products = target.product(refs.k_shared.at[block.rows], transposed(q))
    scores, factor, derivative = tile.scores(products, refs.slopes[head] if scoring.biased else None)
    scores = tile.masked(scores, masked, number)
    lse = target.load(refs.lse_shared.at[slot], COLUMNS)
    weights = jnp.exp2(scores * factor - spread(lse, scores.shape, 1))
    survives = tile.survives(scores.shape, refs, block.row, head)
    weights = weights.astype(refs.q.dtype)
    plgpu.barrier_wait(refs.dout_ready.at[slot])
    if wanted.dv:
        kept = weights if survives is None else jnp.where(survives, weights, jnp.zeros((), weights.dtype))
        dv = target.product(kept, dout, dv)
    if wanted.ds:
        dp = target.product(refs.v_shared.at[block.rows], transposed(dout))
        delta = target.load(refs.delta_shared.at[slot], COLUMNS)
        if survives is not None:
            dp = jnp.where(survives, dp, 0.0)
        ds = weights.astype(jnp.float32) * (dp - spread(delta, dp.shape, 1))
        ds = (ds if derivative is None else ds * derivative).astype(refs.q.dtype)
    # the statistics were read by ordinary loads, which the next copy must not overtake
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.dout_free.at[slot])
    if wanted.dk:
        dk = target.product(ds, q, dk)
    plgpu.barrier_arrive(refs.q_free.at[slot])
    if wanted.dq:
        _add_to_dq(refs, scoring, target, block, (index, first_query, head), ds)
    return dk, dv


def _add_to_dq(refs: Refs, scoring: Scoring, target: Target, block: _Block, step: tuple, ds: Array) -> None:
    """This tile's part of dQ: each warpgroup multiplies both halves of the keys by half of their columns."""
    index, first_query, head = step
    share = refs.dq_shared.shape[2]
    columns = pl.ds(block.warpgroup * share, share)
    # two places: the other warpgroup may still read the one before
    ds_shared = refs.ds_shared.at[lax.rem(index, jnp.int32(2))]
    ds_shared.at[block.rows][...] = ds
    plgpu.commit_smem()
    _meet(refs)
    part = target.product(transposed(ds_shared), refs.k_shared.at[:, columns]) * scoring.gradient_scale
    queries = pl.ds(first_query, BLOCK_QUERIES)
    shared = refs.dq_shared.at[block.warpgroup]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    shared[...] = part
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, refs.dq.at[block.row, queries, head, columns], reduction_op="add")

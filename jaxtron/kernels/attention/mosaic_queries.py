"""dQ of flash attention on Hopper by tiles of queries: the half of the deterministic backward that sums over keys.

A block keeps one tile of queries and their gradient of the output, and walks over tiles of keys like the forward.
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

from jaxtron.kernels.attention.mosaic_forward import Shape, copy_keys
from jaxtron.kernels.attention.mosaic_tiles import Masked, Scoring, Tile, inputs_of, select, visits
from jaxtron.kernels.attention.spec import AttentionSpec, most_pairs
from jaxtron.kernels.mosaic import (
    ROWS,
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
from jaxtron.typing import Array, Float


def shape_of(head_dim: int, value_dim: int) -> Shape:
    """Sizes of a block: two tiles of scores live at once, so half as many keys as forward."""
    stages = 1 if max(head_dim, value_dim) > 192 else 2
    return Shape(warpgroups=2, block_keys=64, stages=stages, memory_registers=24)


@dataclass(frozen=True)
class _Rows:
    """A warpgroup's queries: where they are, and their statistics in registers."""

    row: Any
    head: Any
    warpgroup: Any
    first_query: Any
    lse: Array
    delta: Array


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
    target: Target,
) -> Float[Array, "B S H D"]:
    """dQ of padded inputs of which `sizes` queries and keys count; `lse` as for the other half."""
    (rows, padded, heads, head_dim), value_dim = q.shape, v.shape[3]
    shape = shape_of(head_dim, value_dim)
    scoring = Scoring.of(spec, scale, sizes[1], shape.block_keys)
    return run_kernel(
        lambda refs: _run(refs, shape, scoring, target),
        inputs={
            "bounds": visits(spec, scoring, sizes[0], sizes[1], (shape.block_queries, shape.block_keys)),
            **inputs_of(spec),
            "q": q,
            "k": k,
            "v": v,
            "dout": dout,
            "lse": lse,
            "delta": delta,
        },
        outputs={"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        scratch=_scratch(shape, q.dtype, head_dim, value_dim),
        grid={"head": heads, "tile": padded // shape.block_queries, "row": rows},
        warpgroups=shape.warpgroups + 1,
        target=target,
        name="attention_backward_queries",
        flops=2 * rows * heads * most_pairs(spec, *sizes) * (2 * head_dim + value_dim),
    )["dq"]


def _scratch(shape: Shape, dtype: Any, head_dim: int, value_dim: int) -> dict[str, Any]:
    """Shared memory and barriers."""
    tile = functools.partial(plgpu.SMEM, dtype=dtype)
    queries, keys = (shape.warpgroups, WARPGROUP_ROWS), (shape.stages, shape.block_keys)
    across = plgpu.Barrier(num_arrivals=shape.warpgroups, num_barriers=shape.stages)
    return {
        "q_shared": tile((*queries, head_dim), transforms=swizzled(dtype, head_dim)),
        "dout_shared": tile((*queries, value_dim), transforms=swizzled(dtype, value_dim)),
        "k_shared": tile((*keys, head_dim), transforms=swizzled(dtype, head_dim)),
        "v_shared": tile((*keys, value_dim), transforms=swizzled(dtype, value_dim)),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=shape.warpgroups),
        "k_ready": plgpu.Barrier(num_barriers=shape.stages),
        "v_ready": plgpu.Barrier(num_barriers=shape.stages),
        "k_free": across,
        "v_free": across,
    }


def _run(refs: Refs, shape: Shape, scoring: Scoring, target: Target) -> None:
    """One tile of queries of one head."""
    # under a causal mask the last tiles take longest: they start first
    tile = refs.q.shape[1] // shape.block_queries - 1 - lax.axis_index("tile")
    row, head, warpgroup = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
    bounds = select(refs.bounds, row, tile)
    registers = Registers(shape.warpgroups, shape.memory_registers)

    @pl.when(warpgroup < shape.warpgroups)
    def _() -> None:
        target.registers(registers, memory=False)
        first_query = tile * shape.block_queries + warpgroup * WARPGROUP_ROWS
        _compute(refs, shape, scoring, target, (row, head, warpgroup, first_query), bounds)

    @pl.when(warpgroup == shape.warpgroups)
    def _() -> None:
        target.registers(registers, memory=True)
        copy_keys(refs, shape, row, head, bounds)


def _compute(refs: Refs, shape: Shape, scoring: Scoring, target: Target, where: tuple, bounds: Any) -> None:
    """64 queries: the loop over tiles of keys, then dQ."""
    row, head, warpgroup, first_query = where
    queries, ready = pl.ds(first_query, WARPGROUP_ROWS), refs.q_ready.at[warpgroup]
    q_shared = refs.q_shared.at[warpgroup]
    plgpu.copy_gmem_to_smem(refs.q.at[row, queries, head], q_shared, ready)
    plgpu.copy_gmem_to_smem(refs.dout.at[row, queries, head], refs.dout_shared.at[warpgroup], ready)
    lse, delta = (target.load(ref.at[row, head, queries], ROWS) for ref in (refs.lse, refs.delta))
    rows = _Rows(row, head, warpgroup, first_query, lse, delta)
    plgpu.barrier_wait(ready)
    dq = target.full((WARPGROUP_ROWS, q_shared.shape[1]), 0.0)
    for first, end, masked in scoring.pieces(bounds, once=True):
        step = functools.partial(_step, refs, shape, scoring, target, rows, bounds[0], masked)
        dq = lax.fori_loop(first, end, step, dq)
    q_shared[...] = (dq * scoring.gradient_scale).astype(refs.dq.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_shared, refs.dq.at[row, queries, head])
    plgpu.wait_smem_to_gmem(0)


def _step(
    refs: Refs,
    shape: Shape,
    scoring: Scoring,
    target: Target,
    rows: _Rows,
    start: Any,
    masked: Masked,
    block: Any,
    dq: Array,
) -> Array:
    """One tile of keys."""
    rows = dataclasses.replace(rows, warpgroup=rows.warpgroup + unhoisted(block))
    slot = lax.rem(block - start, jnp.int32(shape.stages))
    first_key = block * shape.block_keys
    segments = None
    if scoring.segmented:
        segments = (
            refs.q_segments.at[rows.row, pl.ds(rows.first_query, WARPGROUP_ROWS)],
            refs.kv_segments.at[rows.row, pl.ds(first_key, shape.block_keys)],
        )
    tile = Tile(target, scoring, rows.first_query, first_key, refs.shift[0], segments, keys_are_rows=False)
    plgpu.barrier_wait(refs.k_ready.at[slot])
    products = target.product(refs.q_shared.at[rows.warpgroup], transposed(refs.k_shared.at[slot]))
    scores, factor, derivative = tile.scores(products, refs.slopes[rows.head] if scoring.biased else None)
    scores = tile.masked(scores, masked, block)
    weights = jnp.exp2(scores * factor - spread(rows.lse, scores.shape, 0))
    plgpu.barrier_wait(refs.v_ready.at[slot])
    dp = target.product(refs.dout_shared.at[rows.warpgroup], transposed(refs.v_shared.at[slot]))
    plgpu.barrier_arrive(refs.v_free.at[slot])
    survives = tile.survives(dp.shape, refs, rows.row, rows.head)
    if survives is not None:
        dp = jnp.where(survives, dp, 0.0)
    ds = weights * (dp - spread(rows.delta, dp.shape, 0))
    ds = (ds if derivative is None else ds * derivative).astype(refs.q.dtype)
    dq = target.product(ds, refs.k_shared.at[slot], dq)
    plgpu.barrier_arrive(refs.k_free.at[slot])
    return dq

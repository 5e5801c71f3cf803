"""Flash attention forward on Hopper (2307.08691, algorithm 1; warpgroups as in 2407.08608, section 3).

A block is one tile of queries of one head. One warpgroup copies keys and values by TMA, two or three others each keep
64 queries: scores, running maximum, sum and output stay in their registers.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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


@dataclass(frozen=True)
class Shape:
    """Sizes of a block."""

    warpgroups: int
    block_keys: int
    stages: int
    memory_registers: int

    @property
    def block_queries(self) -> int:
        """Queries of a block."""
        return self.warpgroups * WARPGROUP_ROWS

    @classmethod
    def of(cls, head_dim: int, value_dim: int, keys: int, spec: AttentionSpec) -> "Shape":
        """The largest tiles whose registers do not spill, as ptxas told (tests/kernels/test_mosaic_compiled.py)."""
        adjusted = spec.logits_soft_cap is not None or spec.alibi_slopes is not None
        segmented = spec.q_segment_ids is not None
        masked = spec.causal or spec.window is not None or segmented or keys % 128 > 0
        if max(head_dim, value_dim) <= 64 and not masked and not adjusted:
            return cls(warpgroups=3, block_keys=128, stages=2, memory_registers=32)
        small = value_dim > 128 or head_dim > 128 or (value_dim > 64 and segmented and adjusted)
        return cls(warpgroups=2, block_keys=64 if small else 128, stages=2, memory_registers=24)


def forward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    spec: AttentionSpec,
    keys: int,
    queries: int,
    scale: float,
    target: Target,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """Output and natural log-sum-exp; S and T are padded to whole tiles, `queries` and `keys` of them count."""
    (rows, padded, heads, head_dim), value_dim = q.shape, v.shape[3]
    shape = Shape.of(head_dim, value_dim, keys, spec)
    scoring = Scoring.of(spec, scale, keys, shape.block_keys)
    made = run_kernel(
        lambda refs: _block(refs, shape, scoring, target),
        inputs={
            "bounds": visits(spec, scoring, queries, keys, (shape.block_queries, shape.block_keys)),
            **inputs_of(spec),
            "q": q,
            "k": k,
            "v": v,
        },
        outputs={
            "out": jax.ShapeDtypeStruct((rows, padded, heads, value_dim), q.dtype),
            "lse": jax.ShapeDtypeStruct((rows, heads, padded), jnp.float32),
        },
        scratch=_scratch(shape, q.dtype, head_dim, value_dim),
        grid={"head": heads, "tile": padded // shape.block_queries, "row": rows},
        warpgroups=shape.warpgroups + 1,
        target=target,
        name="attention_forward",
        flops=2 * rows * heads * most_pairs(spec, queries, keys) * (head_dim + value_dim),
    )
    return made["out"], made["lse"]


def _scratch(shape: Shape, dtype: Any, head_dim: int, value_dim: int) -> dict[str, Any]:
    """Shared memory and barriers."""
    tile = functools.partial(plgpu.SMEM, dtype=dtype)
    queries, keys, values = (shape.warpgroups, WARPGROUP_ROWS), (shape.stages, shape.block_keys), value_dim
    across = plgpu.Barrier(num_arrivals=shape.warpgroups, num_barriers=shape.stages)
    return {
        "q_shared": tile((*queries, head_dim), transforms=swizzled(dtype, head_dim)),
        "k_shared": tile((*keys, head_dim), transforms=swizzled(dtype, head_dim)),
        "v_shared": tile((*keys, values), transforms=swizzled(dtype, values)),
        # the output takes the place of the queries where they are of one size
        "out_shared": None if values == head_dim else tile((*queries, values), transforms=swizzled(dtype, values)),
        "lse_shared": plgpu.SMEM(queries, jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=shape.warpgroups),
        "k_ready": plgpu.Barrier(num_barriers=shape.stages),
        "v_ready": plgpu.Barrier(num_barriers=shape.stages),
        "k_free": across,
        "v_free": across,
        "turn": plgpu.Barrier(num_arrivals=shape.warpgroups),
    }


def _block(refs: Refs, shape: Shape, scoring: Scoring, target: Target) -> None:
    """One tile of queries of one head."""
    # under a causal mask the last tiles take longest: they start first
    tile = refs.q.shape[1] // shape.block_queries - 1 - lax.axis_index("tile")
    row, head, warpgroup = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("warpgroup")
    bounds = select(refs.bounds, row, tile)
    registers = Registers(shape.warpgroups, shape.memory_registers)

    @pl.when(warpgroup < shape.warpgroups)
    def _() -> None:
        target.registers(registers, memory=False)
        _compute(refs, shape, scoring, target, (row, tile, head, warpgroup), bounds)

    @pl.when(warpgroup == shape.warpgroups)
    def _() -> None:
        target.registers(registers, memory=True)
        copy_keys(refs, shape, row, head, bounds)


def copy_keys(refs: Refs, shape: Shape, row: Any, head: Any, bounds: Any) -> None:
    """Keeps the stages full of keys and values."""
    kv_head = lax.div(head, jnp.int32(refs.q.shape[2] // refs.k.shape[2]))
    start, end, *_ = bounds

    def step(index: Any, _: None) -> None:
        slot = lax.rem(index, jnp.int32(shape.stages))
        block = (row, pl.ds((start + index) * shape.block_keys, shape.block_keys), kv_head)
        for source, shared, ready, free in (
            (refs.k, refs.k_shared, refs.k_ready, refs.k_free),
            (refs.v, refs.v_shared, refs.v_ready, refs.v_free),
        ):
            pl.when(index >= shape.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[block], shared.at[slot], ready.at[slot])

    steps = end - start
    lax.fori_loop(0, steps, step, None)

    def drain(index: Any, _: None) -> None:
        slot = lax.rem(index, jnp.int32(shape.stages))
        plgpu.barrier_wait(refs.k_free.at[slot])
        plgpu.barrier_wait(refs.v_free.at[slot])

    # a block ends only when every arrival was seen
    lax.fori_loop(lax.max(steps - shape.stages, jnp.int32(0)), steps, drain, None)


def _compute(refs: Refs, shape: Shape, scoring: Scoring, target: Target, where: tuple, bounds: Any) -> None:
    """64 queries: the loop over their tiles of keys, then output and log-sum-exp."""
    row, tile, head, warpgroup = where
    first_query = tile * shape.block_queries + warpgroup * WARPGROUP_ROWS
    queries = pl.ds(first_query, WARPGROUP_ROWS)
    q_shared, ready = refs.q_shared.at[warpgroup], refs.q_ready.at[warpgroup]
    plgpu.copy_gmem_to_smem(refs.q.at[row, queries, head], q_shared, ready)
    plgpu.barrier_wait(ready)
    turns = shape.warpgroups == 2

    def take_turn() -> None:
        if turns:
            plgpu.barrier_arrive(refs.turn)
            plgpu.barrier_wait(refs.turn)

    carry = (
        target.full((WARPGROUP_ROWS, refs.v.shape[3]), 0.0),
        target.full((WARPGROUP_ROWS,), -jnp.inf, ROWS),
        target.full((WARPGROUP_ROWS,), 0.0, ROWS),
    )
    # the second warpgroup lags by half a step: its softmax runs while the first multiplies
    pl.when(warpgroup == 1)(take_turn)
    for first, end, masked in scoring.pieces(bounds, once=scoring.segmented and scoring.plain):
        step = functools.partial(
            _step, refs, shape, scoring, target, (row, head, warpgroup, first_query), bounds[0], masked, take_turn
        )
        carry = lax.fori_loop(first, end, step, carry)
    pl.when(warpgroup == 0)(take_turn)
    _store(refs, target, where, queries, carry, scoring.weight_scale)


def _step(
    refs: Refs,
    shape: Shape,
    scoring: Scoring,
    target: Target,
    where: tuple,
    start: Any,
    masked: Masked,
    take_turn: Any,
    block: Any,
    carry: tuple,
) -> tuple:
    """One tile of keys: scores, running maximum and sum, output."""
    row, head, warpgroup, first_query = where
    out, maximum, total = carry
    warpgroup = warpgroup + unhoisted(block)
    slot = lax.rem(block - start, jnp.int32(shape.stages))
    first_key = block * shape.block_keys
    segments = None
    if scoring.segmented:
        segments = (
            refs.q_segments.at[row, pl.ds(first_query, WARPGROUP_ROWS)],
            refs.kv_segments.at[row, pl.ds(first_key, shape.block_keys)],
        )
    tile = Tile(target, scoring, first_query, first_key, refs.shift[0], segments, keys_are_rows=False)
    plgpu.barrier_wait(refs.k_ready.at[slot])
    products = target.product(refs.q_shared.at[warpgroup], transposed(refs.k_shared.at[slot]), issued=take_turn)
    plgpu.barrier_arrive(refs.k_free.at[slot])
    scores, factor, _ = tile.scores(products, refs.slopes[head] if scoring.biased else None)
    scores = tile.masked(scores, masked, block)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * factor)
    # a row that has seen no key yet has the maximum -inf, which must not meet itself in a difference
    reference = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum) if scoring.masked else new_maximum
    fade = jnp.exp2(maximum - reference)
    weights = jnp.exp2(scores * factor - spread(reference, scores.shape, 0))
    total = total * fade + weights.sum(axis=1)
    out = out * spread(fade, out.shape, 0)
    survives = tile.survives(weights.shape, refs, row, head)
    if survives is not None:
        # a zero that LLVM does not know: a constant it would select number by number, after they are rounded in pairs
        weights = jnp.where(survives, weights, unhoisted(block).astype(jnp.float32))
    narrow = weights.astype(refs.v.dtype)
    plgpu.barrier_wait(refs.v_ready.at[slot])
    take_turn()
    out = target.product(narrow, refs.v_shared.at[slot], out)
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return out, new_maximum, total


def _store(refs: Refs, target: Target, where: tuple, queries: Any, carry: tuple, factor: float) -> None:
    """Output, times `factor`, and log-sum-exp to global memory; a row without keys is 0 and -inf."""
    row, _, head, warpgroup = where
    out, maximum, total = carry
    seen = total > 0.0
    share = jnp.where(seen, factor / total, 0.0)
    shared = (refs.q_shared if refs.out_shared is None else refs.out_shared).at[warpgroup]
    shared[...] = (out * spread(share, out.shape, 0)).astype(refs.out.dtype)
    refs.lse_shared.at[warpgroup][...] = jnp.where(seen, maximum * math.log(2.0) + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, refs.out.at[row, queries, head])
    plgpu.copy_smem_to_gmem(refs.lse_shared.at[warpgroup], refs.lse.at[row, head, queries])
    plgpu.wait_smem_to_gmem(0)

"""State-space duality backward on Hopper by the inputs of a chunk: dx, dB, and what decays and steps have of them.

A block loops over heads that read one B, whose gradient stays in registers. Rows of its tiles are inputs, so that what
an input has of all outputs is a sum along a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtron.kernels.mosaic import (
    COLUMNS,
    ROWS,
    WARPGROUP_ROWS,
    Refs,
    Target,
    plgpu,
    run_kernel,
    spread,
    transposed,
    unhoisted,
)
from jaxtron.kernels.ssd.mosaic_chunks import (
    CHUNK,
    WARPGROUPS,
    WIDTH,
    Sizes,
    decay_between,
    half,
    scalar,
    stage_of,
    sum_over_heads,
    values_of,
    vectors,
)
from jaxtron.kernels.ssd.mosaic_decays import Decays
from jaxtron.typing import Array

_STAGES = 2
_COPIES = 6


class ByInputs(NamedTuple):
    """Gradients by the inputs of chunks; sums by head and position in float32."""

    dx: Array
    dB: Array
    """[B, S, G * parts, N]."""
    inside: Array
    """[B, H, S]: what an input's dt has of the outputs of its chunk, times dt."""
    behind: Array
    """The same of the state after the chunk."""
    skipped: Array
    """x . dy."""


def by_inputs(
    x: Array,
    dy: Array,
    B: Array,
    C: Array,
    D: Array,
    dstates: Array,
    scores: Array,
    decays: Decays,
    parts: int,
    target: Target,
) -> ByInputs:
    """`dstates` are gradients of the states after the chunks; `parts` blocks share out the heads of a group.

    `scores` [B, chunks, G, inputs, outputs] are products of B and C.
    """
    sizes = Sizes.of(x, B)
    rows, chunks, heads, size = sizes.rows, sizes.chunks, sizes.heads, sizes.size
    numbers = jax.ShapeDtypeStruct((rows, heads, sizes.length), jnp.float32)
    made = run_kernel(
        lambda refs: _block(refs, sizes, parts, target),
        inputs={
            "x": x,
            "dy": dy,
            "b": B,
            "c": C,
            "dstates": dstates,
            "sums": decays.sums,
            "to_end": decays.to_end,
            "steps": decays.steps,
            "ahead": decays.ahead,
            "scores": scores,
            "skip": D,
        },
        outputs={
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "dB": jax.ShapeDtypeStruct((rows, sizes.length, sizes.groups * parts, size), x.dtype),
            "inside": numbers,
            "behind": numbers,
            "skipped": numbers,
        },
        scratch={
            "b_shared": sizes.matrix(CHUNK, size),
            "c_shared": sizes.matrix(CHUNK, size),
            "x_shared": sizes.matrix(_STAGES, CHUNK, WIDTH),
            "dy_shared": sizes.matrix(_STAGES, CHUNK, WIDTH),
            "dstate_shared": sizes.matrix(_STAGES, size, WIDTH),
            "sums_shared": vectors(_STAGES, CHUNK),
            "to_end_shared": vectors(_STAGES, CHUNK),
            "steps_shared": vectors(_STAGES, CHUNK),
            "dx_shared": sizes.matrix(WARPGROUPS, WARPGROUP_ROWS, WIDTH),
            "out_shared": vectors(3, WARPGROUPS, WARPGROUP_ROWS),
            "scores_shared": sizes.matrix(CHUNK, CHUNK),
            "once": plgpu.Barrier(num_arrivals=3),
            "ready": plgpu.Barrier(num_arrivals=_COPIES, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=_STAGES),
        },
        grid={"part": sizes.groups * parts, "chunk": chunks, "row": rows},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name="ssd_by_inputs",
        flops=2 * rows * heads * chunks * (2 * CHUNK * size * WIDTH + sizes.pairs * (size + 2 * WIDTH)),
    )
    return ByInputs(**made)


def _block(refs: Refs, sizes: Sizes, parts: int, target: Target) -> None:
    def of_head(row: Any, chunk: Any, head: Any, here: Any) -> tuple[tuple[Any, Any], ...]:
        return (
            (refs.x.at[row, here, head], refs.x_shared),
            (refs.dy.at[row, here, head], refs.dy_shared),
            (refs.dstates.at[row, chunk, head], refs.dstate_shared),
            (refs.sums.at[row, head, here], refs.sums_shared),
            (refs.to_end.at[row, head, here], refs.to_end_shared),
            (refs.steps.at[row, head, here], refs.steps_shared),
        )

    sum_over_heads(
        refs,
        sizes,
        parts,
        target,
        stages=_STAGES,
        of_head=of_head,
        reach=refs.ahead,
        shared=refs.b_shared,
        out=refs.dB,
        step=functools.partial(_step, refs, sizes, target),
    )


def _step(refs: Refs, sizes: Sizes, target: Target, block: tuple, reach: Any, index: Any, total: Any) -> Any:
    """One head: dx of 64 inputs, and what their B has of it beside `total`."""
    row, first, mine, warpgroup = block
    moving = warpgroup + unhoisted(index)
    own, stage, head = half(moving), stage_of(index, _STAGES), first + index
    plgpu.barrier_wait(refs.ready.at[stage])
    dstate = refs.dstate_shared.at[stage]
    weight = jnp.exp2(target.load(refs.to_end_shared.at[stage, own], ROWS))
    dx = target.product(refs.b_shared.at[own], dstate)
    dx = dx * spread(weight, dx.shape, 0)
    x = values_of(target, refs.x_shared.at[stage, own])
    behind = jnp.sum(dx * x, 1)
    weighted = (x * spread(weight, x.shape, 0)).astype(sizes.dtype)
    total = target.product(weighted, transposed(dstate), total)
    add = functools.partial(_add, refs, sizes, target, moving, stage, reach)
    carry = (dx, total, target.full((WARPGROUP_ROWS,), 0.0, ROWS))
    dx, total, inside = lax.fori_loop(moving, WARPGROUPS, add, carry)
    # again: it would take registers meanwhile
    x, dy = (values_of(target, shared.at[stage, own]) for shared in (refs.x_shared, refs.dy_shared))
    dx = dx + dy * scalar(refs.skip, head)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.dx_shared.at[warpgroup][...] = dx.astype(sizes.dtype)
    for place, numbers in enumerate((inside, behind, jnp.sum(x * dy, 1))):
        refs.out_shared.at[place, warpgroup][...] = numbers
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.free.at[stage])
    plgpu.copy_smem_to_gmem(refs.dx_shared.at[warpgroup], refs.dx.at[row, mine, head])
    for place, out in enumerate((refs.inside, refs.behind, refs.skipped)):
        plgpu.copy_smem_to_gmem(refs.out_shared.at[place, warpgroup], out.at[row, head, mine])
    return total


def _add(
    refs: Refs, sizes: Sizes, target: Target, moving: Any, stage: Any, reach: Any, other: Any, carry: tuple
) -> tuple[Any, Any, Any]:
    """What 64 outputs add to dx, dB and the sums along rows."""
    dx, total, inside = carry
    own, outputs = half(moving), half(other)
    shape = (WARPGROUP_ROWS, WARPGROUP_ROWS)
    # in this order fewest registers spill
    scores = values_of(target, refs.scores_shared.at[own, outputs])
    dscores = target.product(refs.x_shared.at[stage, own], transposed(refs.dy_shared.at[stage, outputs]))
    out_sums = target.load(refs.sums_shared.at[stage, outputs], COLUMNS)
    logs = spread(out_sums, shape, 1) - spread(target.load(refs.sums_shared.at[stage, own], ROWS), shape, 0)
    first_row, first_column = moving * WARPGROUP_ROWS, other * WARPGROUP_ROWS
    decay = decay_between(target, logs, first_row, first_column, reach, rows_are_inputs=True)
    decay = decay * spread(target.load(refs.steps_shared.at[stage, own], ROWS), shape, 0)
    dscores = dscores * decay
    inside = inside + jnp.sum(scores * dscores, 1)
    weights = (scores * decay).astype(sizes.dtype)
    dscores = dscores.astype(sizes.dtype)
    total = target.product(dscores, refs.c_shared.at[outputs], total)
    dx = target.product(weights, refs.dy_shared.at[stage, outputs], dx)
    return dx, total, inside

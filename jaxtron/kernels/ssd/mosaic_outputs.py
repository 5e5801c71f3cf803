"""State-space duality backward on Hopper by the outputs of a chunk: dC, and what decays have of them.

A block loops over heads that read one C, whose gradient stays in registers. Rows of its tiles are outputs.
"""

import functools
from typing import Any

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
    stage_of,
    sum_over_heads,
    values_of,
    vectors,
)
from jaxtron.kernels.ssd.mosaic_decays import Decays
from jaxtron.typing import Array

_STAGES = 2
_COPIES = 6


def by_outputs(
    x: Array,
    dy: Array,
    B: Array,
    C: Array,
    states: Array,
    scores: Array,
    decays: Decays,
    parts: int,
    target: Target,
) -> tuple[Array, Array]:
    """dC [B, S, G * parts, N]; and by head and position what an output's decay has of all before it, float32
    [B, H, S].

    `states` are those that enter the chunks; `parts` blocks share out the heads of a group. `scores` [B, chunks, G,
    outputs, inputs] are products of C and B.
    """
    sizes = Sizes.of(x, B)
    rows, chunks, heads, size = sizes.rows, sizes.chunks, sizes.heads, sizes.size
    made = run_kernel(
        lambda refs: _block(refs, sizes, parts, target),
        inputs={
            "x": x,
            "dy": dy,
            "b": B,
            "c": C,
            "states": states,
            "sums": decays.sums,
            "from_start": decays.from_start,
            "steps": decays.steps,
            "back": decays.back,
            "scores": scores,
        },
        outputs={
            "dC": jax.ShapeDtypeStruct((rows, sizes.length, sizes.groups * parts, size), x.dtype),
            "before": jax.ShapeDtypeStruct((rows, heads, sizes.length), jnp.float32),
        },
        scratch={
            "b_shared": sizes.matrix(CHUNK, size),
            "c_shared": sizes.matrix(CHUNK, size),
            "x_shared": sizes.matrix(_STAGES, CHUNK, WIDTH),
            "dy_shared": sizes.matrix(_STAGES, CHUNK, WIDTH),
            "state_shared": sizes.matrix(_STAGES, size, WIDTH),
            "sums_shared": vectors(_STAGES, CHUNK),
            "from_start_shared": vectors(_STAGES, CHUNK),
            "steps_shared": vectors(_STAGES, CHUNK),
            "out_shared": vectors(WARPGROUPS, WARPGROUP_ROWS),
            "scores_shared": sizes.matrix(CHUNK, CHUNK),
            "once": plgpu.Barrier(num_arrivals=3),
            "ready": plgpu.Barrier(num_arrivals=_COPIES, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=_STAGES),
        },
        grid={"part": sizes.groups * parts, "chunk": chunks, "row": rows},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name="ssd_by_outputs",
        flops=2 * rows * heads * chunks * (CHUNK * size * WIDTH + sizes.pairs * (size + WIDTH)),
    )
    return made["dC"], made["before"]


def _block(refs: Refs, sizes: Sizes, parts: int, target: Target) -> None:
    def of_head(row: Any, chunk: Any, head: Any, here: Any) -> tuple[tuple[Any, Any], ...]:
        return (
            (refs.x.at[row, here, head], refs.x_shared),
            (refs.dy.at[row, here, head], refs.dy_shared),
            (refs.states.at[row, chunk, head], refs.state_shared),
            (refs.sums.at[row, head, here], refs.sums_shared),
            (refs.from_start.at[row, head, here], refs.from_start_shared),
            (refs.steps.at[row, head, here], refs.steps_shared),
        )

    sum_over_heads(
        refs,
        sizes,
        parts,
        target,
        stages=_STAGES,
        of_head=of_head,
        reach=refs.back,
        shared=refs.c_shared,
        out=refs.dC,
        step=functools.partial(_step, refs, sizes, target),
    )


def _step(refs: Refs, sizes: Sizes, target: Target, block: tuple, reach: Any, index: Any, total: Any) -> Any:
    """One head: what C of 64 outputs has of it beside `total`."""
    row, first, mine, warpgroup = block
    moving = warpgroup + unhoisted(index)
    own, stage, head = half(moving), stage_of(index, _STAGES), first + index
    plgpu.barrier_wait(refs.ready.at[stage])
    entered = target.product(refs.dy_shared.at[stage, own], transposed(refs.state_shared.at[stage]))
    left = jnp.exp2(target.load(refs.from_start_shared.at[stage, own], ROWS))
    entered = entered * spread(left, entered.shape, 0)
    before = jnp.sum(entered * values_of(target, refs.c_shared.at[own]), 1)
    sums = target.load(refs.sums_shared.at[stage, own], ROWS)
    add = functools.partial(_add, refs, sizes, target, moving, stage, sums, reach)
    total, before = lax.fori_loop(0, moving + 1, add, (total + entered, before))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.out_shared.at[warpgroup][...] = before
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.free.at[stage])
    plgpu.copy_smem_to_gmem(refs.out_shared.at[warpgroup], refs.before.at[row, head, mine])
    return total


def _add(
    refs: Refs, sizes: Sizes, target: Target, moving: Any, stage: Any, sums: Any, reach: Any, other: Any, carry: tuple
) -> tuple[Any, Any]:
    """What 64 inputs add to dC and the sums along rows."""
    total, before = carry
    own, inputs = half(moving), half(other)
    in_sums = target.load(refs.sums_shared.at[stage, inputs], COLUMNS)
    shape = (WARPGROUP_ROWS, WARPGROUP_ROWS)
    logs = spread(sums, shape, 0) - spread(in_sums, shape, 1)
    dscores = target.product(refs.dy_shared.at[stage, own], transposed(refs.x_shared.at[stage, inputs]))
    first_row, first_column = moving * WARPGROUP_ROWS, other * WARPGROUP_ROWS
    # dt by itself: rounded in the exponent, what an input and an output have of a pair would not cancel
    decay = decay_between(target, logs, first_row, first_column, reach, rows_are_inputs=False)
    decay = decay * spread(target.load(refs.steps_shared.at[stage, inputs], COLUMNS), shape, 1)
    dscores = dscores * decay
    scores = values_of(target, refs.scores_shared.at[own, inputs])
    before = before + jnp.sum(scores * dscores, 1)
    total = target.product(dscores.astype(sizes.dtype), refs.b_shared.at[inputs], total)
    return total, before

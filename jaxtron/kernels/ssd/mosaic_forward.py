"""State-space duality forward on Hopper: a block walks along the chunks of one head.

Its state stays in registers, in float32; products take a copy in the type of x, the very one that is kept for the
backward.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

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
    keep_full,
    meet,
    positions,
    scalar,
    share_out,
    stage_of,
    state_of,
    values_of,
    vectors,
)
from jaxtron.kernels.ssd.mosaic_decays import Decays
from jaxtron.typing import Array

_STAGES = 2
_COPIES = 7


def forward(
    x: Array, B: Array, C: Array, D: Array, initial: Array, decays: Decays, target: Target
) -> tuple[Array, Array, Array]:
    """y, the states that enter the chunks [B, chunks, H, N, 64] in the type of x, and the final state."""
    sizes = Sizes.of(x, B)
    rows, chunks, heads, size = sizes.rows, sizes.chunks, sizes.heads, sizes.size
    made = run_kernel(
        lambda refs: _block(refs, sizes, target),
        inputs={
            "x": x,
            "b": B,
            "c": C,
            "sums": decays.sums,
            "shifted": decays.shifted,
            "from_start": decays.from_start,
            "to_end": decays.to_end,
            "through": decays.through,
            "back": decays.back,
            "skip": D,
            "initial": initial,
        },
        outputs={
            "y": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "states": jax.ShapeDtypeStruct((rows, chunks, heads, size, WIDTH), x.dtype),
            "final": jax.ShapeDtypeStruct((rows, heads, size, WIDTH), jnp.float32),
        },
        scratch={
            "x_shared": sizes.matrix(_STAGES, CHUNK, WIDTH),
            "b_shared": sizes.matrix(_STAGES, CHUNK, size),
            "c_shared": sizes.matrix(_STAGES, CHUNK, size),
            "sums_shared": vectors(_STAGES, CHUNK),
            "shifted_shared": vectors(_STAGES, CHUNK),
            "from_start_shared": vectors(_STAGES, CHUNK),
            "to_end_shared": vectors(_STAGES, CHUNK),
            "weighted": sizes.matrix(CHUNK, WIDTH),
            "state": sizes.matrix(size, WIDTH),
            "y_shared": sizes.matrix(WARPGROUPS, WARPGROUP_ROWS, WIDTH),
            "ready": plgpu.Barrier(num_arrivals=_COPIES, num_barriers=_STAGES),
            "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=_STAGES),
            "meeting": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        grid={"head": heads, "row": rows},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name="ssd_forward",
        flops=2 * rows * heads * chunks * (sizes.pairs * (size + WIDTH) + 2 * CHUNK * size * WIDTH),
    )
    return made["y"], made["states"], made["final"]


def _block(refs: Refs, sizes: Sizes, target: Target) -> None:
    row, head = lax.axis_index("row"), lax.axis_index("head")
    group = sizes.group(head)

    def copy(index: Any, stage: Any) -> None:
        here, ready = pl.ds(index * CHUNK, CHUNK), refs.ready.at[stage]
        for source, shared in (
            (refs.x.at[row, here, head], refs.x_shared),
            (refs.b.at[row, here, group], refs.b_shared),
            (refs.c.at[row, here, group], refs.c_shared),
            (refs.sums.at[row, head, here], refs.sums_shared),
            (refs.shifted.at[row, head, here], refs.shifted_shared),
            (refs.from_start.at[row, head, here], refs.from_start_shared),
            (refs.to_end.at[row, head, here], refs.to_end_shared),
        ):
            plgpu.copy_gmem_to_smem(source, shared.at[stage], ready)

    share_out(
        target,
        functools.partial(_compute, refs, sizes, target, row, head),
        lambda: keep_full(sizes.chunks, _STAGES, refs.free, copy),
    )


def _compute(refs: Refs, sizes: Sizes, target: Target, row: Any, head: Any, warpgroup: Any) -> None:
    """64 positions of every chunk, and 64 rows of the state; a state of 64 rows is both warpgroups', one keeps it."""
    blocks = sizes.size // WARPGROUP_ROWS
    own = half(lax.rem(warpgroup, jnp.int32(blocks)))

    def keep(state: Any, chunk: Any) -> None:
        """The state that enters a chunk, for products and for the backward."""

        @pl.when(warpgroup < blocks)
        def _() -> None:
            refs.state.at[own][...] = state.astype(sizes.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs.state.at[own], refs.states.at[row, chunk, head, own])

    state = state_of(target, refs.initial.at[row, head, own])
    keep(state, 0)
    meet(refs.meeting)

    def step(index: Any, state: Any) -> Any:
        stage = stage_of(index, _STAGES)
        plgpu.barrier_wait(refs.ready.at[stage])
        _outputs(refs, sizes, target, (row, head, warpgroup), index, stage)
        meet(refs.meeting)
        state = state * jnp.exp2(scalar(refs.through, row, head, index))
        state = target.product(transposed(refs.b_shared.at[stage, :, own]), refs.weighted, state)
        plgpu.barrier_arrive(refs.free.at[stage])
        pl.when(index + 1 < sizes.chunks)(lambda: keep(state, index + 1))
        meet(refs.meeting)
        return state

    state = lax.fori_loop(0, sizes.chunks, step, state)

    @pl.when(warpgroup < blocks)
    def _() -> None:
        refs.final.at[row, head, own][...] = state

    plgpu.wait_smem_to_gmem(0)


def _outputs(refs: Refs, sizes: Sizes, target: Target, block: tuple, index: Any, stage: Any) -> None:
    """y of a warpgroup's positions, on its way out; and its part of what the chunk adds to the state."""
    row, head, warpgroup = block
    moving = warpgroup + unhoisted(index)
    own = half(moving)
    y = target.product(refs.c_shared.at[stage, own], refs.state)
    y = y * spread(jnp.exp2(target.load(refs.from_start_shared.at[stage, own], ROWS)), y.shape, 0)
    sums = target.load(refs.sums_shared.at[stage, own], ROWS)
    reach = None if refs.back is None else target.load(refs.back.at[row, positions(index, moving)], ROWS)

    def add(other: Any, y: Any) -> Any:
        inputs = half(other)
        scores = target.product(refs.c_shared.at[stage, own], transposed(refs.b_shared.at[stage, inputs]))
        shifted = target.load(refs.shifted_shared.at[stage, inputs], COLUMNS)
        logs = spread(sums, scores.shape, 0) - spread(shifted, scores.shape, 1)
        first_row, first_column = moving * WARPGROUP_ROWS, other * WARPGROUP_ROWS
        decay = decay_between(target, logs, first_row, first_column, reach, rows_are_inputs=False)
        return target.product((scores * decay).astype(sizes.dtype), refs.x_shared.at[stage, inputs], y)

    y = lax.fori_loop(0, moving + 1, add, y)
    x = values_of(target, refs.x_shared.at[stage, own])
    y = y + x * scalar(refs.skip, head)
    weight = jnp.exp2(target.load(refs.to_end_shared.at[stage, own], ROWS))
    refs.weighted.at[own][...] = (x * spread(weight, x.shape, 0)).astype(sizes.dtype)
    # also for the state that entered, which is written anew after the meeting
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.y_shared.at[warpgroup][...] = y.astype(sizes.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.y_shared.at[warpgroup], refs.y.at[row, positions(index, warpgroup), head])

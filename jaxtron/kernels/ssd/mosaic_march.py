"""States of state-space duality from chunk to chunk on Hopper, either way, without what else a chunk computes.

It is a summary of a piece of a sequence, or the gradients of all states, which the backward's other kernels read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtron.kernels.mosaic import ROWS, WARPGROUP_ROWS, Refs, Target, plgpu, run_kernel, spread, transposed
from jaxtron.kernels.ssd.mosaic_chunks import (
    CHUNK,
    WARPGROUPS,
    WIDTH,
    Sizes,
    half,
    keep_full,
    meet,
    scalar,
    share_out,
    stage_of,
    state_of,
    values_of,
    vectors,
)
from jaxtron.typing import Array


def march(
    values: Array,
    keys: Array,
    weights: Array,
    through: Array,
    initial: Array,
    target: Target,
    *,
    reverse: bool,
    others: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """state <- through * state + keys^T (weights * values), chunk after chunk, or the last one first.

    values [B, S, H, 64], keys [B, S, G, N]; weights [B, H, S] and through [B, H, chunks] are logarithms of base 2.
    Returns the last state; with `others` (states of chunks, [B, chunks, H, N, 64]) also the states before each
    chunk's step, in the type of the values, and sums over columns of through * state * others in float32
    [B, chunks, H, N].
    """
    sizes = Sizes.of(values, keys)
    rows, chunks, heads, size = sizes.rows, sizes.chunks, sizes.heads, sizes.size
    keeps = others is not None
    stages = 2 if keeps else 3
    made = run_kernel(
        lambda refs: _block(refs, sizes, target, reverse),
        inputs={
            "values": values,
            "keys": keys,
            "weights": weights,
            "through": through,
            "initial": initial,
            "others": others,
        },
        outputs={
            "last": jax.ShapeDtypeStruct((rows, heads, size, WIDTH), jnp.float32),
            "states": jax.ShapeDtypeStruct((rows, chunks, heads, size, WIDTH), values.dtype) if keeps else None,
            "products": jax.ShapeDtypeStruct((rows, chunks, heads, size), jnp.float32) if keeps else None,
        },
        scratch={
            "values_shared": sizes.matrix(stages, CHUNK, WIDTH),
            "keys_shared": sizes.matrix(stages, CHUNK, size),
            "weights_shared": vectors(stages, CHUNK),
            "others_shared": sizes.matrix(stages, size, WIDTH) if keeps else None,
            # in two places: the other warpgroup, or a copy out, may still read the one before
            "weighted": sizes.matrix(2, CHUNK, WIDTH),
            "state": sizes.matrix(2, size, WIDTH) if keeps else None,
            "sums": vectors(2, size) if keeps else None,
            "ready": plgpu.Barrier(num_arrivals=3 + keeps, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            "meeting": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        grid={"head": heads, "row": rows},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name="ssd_march",
        flops=2 * rows * heads * chunks * CHUNK * size * WIDTH,
    )
    return made["last"], made.get("states"), made.get("products")


def _block(refs: Refs, sizes: Sizes, target: Target, reverse: bool) -> None:
    row, head = lax.axis_index("row"), lax.axis_index("head")
    stages, group = refs.values_shared.shape[0], sizes.group(head)

    def chunk_of(index: Any) -> Any:
        return sizes.chunks - 1 - index if reverse else index

    def copy(index: Any, stage: Any) -> None:
        chunk, ready = chunk_of(index), refs.ready.at[stage]
        here = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(refs.values.at[row, here, head], refs.values_shared.at[stage], ready)
        plgpu.copy_gmem_to_smem(refs.keys.at[row, here, group], refs.keys_shared.at[stage], ready)
        plgpu.copy_gmem_to_smem(refs.weights.at[row, head, here], refs.weights_shared.at[stage], ready)
        if refs.others is not None:
            plgpu.copy_gmem_to_smem(refs.others.at[row, chunk, head], refs.others_shared.at[stage], ready)

    def compute(warpgroup: Any) -> None:
        blocks = sizes.size // WARPGROUP_ROWS
        own = half(lax.rem(warpgroup, jnp.int32(blocks)))

        def step(index: Any, state: Any) -> Any:
            block = (row, head, chunk_of(index), warpgroup)
            return _step(refs, sizes, target, block, own, index, state)

        state = lax.fori_loop(0, sizes.chunks, step, state_of(target, refs.initial.at[row, head, own]))

        # a state of 64 rows is both warpgroups'
        @pl.when(warpgroup < blocks)
        def _() -> None:
            refs.last.at[row, head, own][...] = state

        plgpu.wait_smem_to_gmem(0)

    share_out(target, compute, lambda: keep_full(sizes.chunks, stages, refs.free, copy))


def _step(refs: Refs, sizes: Sizes, target: Target, block: tuple, own: Any, index: Any, state: Any) -> Any:
    """64 rows of the state after a chunk."""
    row, head, chunk, warpgroup = block
    stage, place = stage_of(index, refs.values_shared.shape[0]), stage_of(index, 2)
    plgpu.barrier_wait(refs.ready.at[stage])
    left = jnp.exp2(scalar(refs.through, row, head, chunk))
    inputs = half(warpgroup)
    weight = jnp.exp2(target.load(refs.weights_shared.at[stage, inputs], ROWS))
    values = values_of(target, refs.values_shared.at[stage, inputs])
    refs.weighted.at[place, inputs][...] = (values * spread(weight, values.shape, 0)).astype(sizes.dtype)
    if refs.others is not None:
        pl.when(warpgroup < sizes.size // WARPGROUP_ROWS)(
            functools.partial(_keep, refs, sizes, target, (row, head, chunk), own, (stage, place), state, left)
        )
    plgpu.commit_smem()
    meet(refs.meeting)
    keys = transposed(refs.keys_shared.at[stage, :, own])
    state = target.product(keys, refs.weighted.at[place], state * left)
    plgpu.barrier_arrive(refs.free.at[stage])
    return state


def _keep(
    refs: Refs, sizes: Sizes, target: Target, where: tuple, own: Any, at: tuple[Any, Any], state: Any, left: Any
) -> None:
    """The state before a chunk's step, and its product with another one, on their way out."""
    row, head, chunk = where
    stage, place = at
    # of the step before the last one, whose places these are
    plgpu.wait_smem_to_gmem(2, wait_read_only=True)
    refs.state.at[place, own][...] = state.astype(sizes.dtype)
    products = state * values_of(target, refs.others_shared.at[stage, own])
    refs.sums.at[place, own][...] = jnp.sum(products, 1) * left
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.state.at[place, own], refs.states.at[row, chunk, head, own])
    plgpu.copy_smem_to_gmem(refs.sums.at[place, own], refs.products.at[row, chunk, head, own])

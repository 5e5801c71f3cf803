"""What the Mosaic kernels of state-space duality share: how arrays are cut, and who does what in a block.

A chunk has 128 positions, whatever a model says of it, and a head 64 columns: a wider one is several heads with the
same dt, A and D, for columns of x do not know of each other. Two warpgroups compute, each 64 rows of whatever it is,
and a third one copies.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtron.kernels.mosaic import ROWS, TILE, WARPGROUP_ROWS, Refs, Registers, Target, plgpu, spread, swizzled
from jaxtron.typing import Array, DTypeLike

WARPGROUPS = 2
CHUNK = WARPGROUPS * WARPGROUP_ROWS
WIDTH = 64
"""Columns of a head."""
STATE_SIZES = (64, 128)
"""N that a block's registers and shared memory hold."""
_REGISTERS = Registers(WARPGROUPS, memory=24)


@dataclass(frozen=True)
class Sizes:
    """Of arrays that are cut: x [B, S, H, 64], B and C [B, S, G, N]."""

    rows: int
    length: int
    heads: int
    groups: int
    size: int
    """N."""
    dtype: DTypeLike

    @classmethod
    def of(cls, values: Array, keys: Array) -> "Sizes":
        """Of x or dy, and B or C."""
        rows, length, heads, _ = values.shape
        return cls(rows, length, heads, keys.shape[2], keys.shape[3], values.dtype)

    @property
    def chunks(self) -> int:
        """Of a row."""
        return self.length // CHUNK

    @property
    def pairs(self) -> int:
        """Of positions in a chunk's tiles of 64 x 64: the one above the diagonal is left out."""
        return CHUNK * CHUNK * 3 // 4

    def group(self, head: Any) -> Any:
        """Whose B and C a head reads."""
        return lax.div(head, jnp.int32(self.heads // self.groups))

    def matrix(self, *shape: int) -> Any:
        """Shared memory of a matrix that tensor cores read."""
        return plgpu.SMEM(shape, self.dtype, transforms=swizzled(self.dtype, shape[-1]))


def vectors(*shape: int) -> Any:
    """Shared memory of float32 numbers."""
    return plgpu.SMEM(shape, jnp.float32)


def share_out(target: Target, compute: Callable[[Any], None], copy: Callable[[], None]) -> None:
    """A block's body: `compute` by each of the warpgroups that do, `copy` by the one behind them."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        target.registers(_REGISTERS, memory=False)
        compute(warpgroup)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        target.registers(_REGISTERS, memory=True)
        copy()


def sum_over_heads(
    refs: Refs,
    sizes: Sizes,
    parts: int,
    target: Target,
    *,
    stages: int,
    of_head: Callable[[Any, Any, Any, Any], tuple[tuple[Any, Any], ...]],
    reach: Any,
    shared: Any,
    out: Any,
    step: Callable[..., Any],
) -> None:
    """A block's body: `out` [B, S, part, N] of a chunk, a sum over the heads of a part of a group.

    A block reads B, C and their products once, and for each head `of_head` (row, chunk, head, positions): pairs of
    global and shared memory. `step` (row, first head, positions, warpgroup; reach, head, sum) adds one head to the sum
    of a warpgroup's rows. These leave by way of `shared`, B or C, whose rows nobody else reads. `reach` is
    `decay_between`'s, of all positions, or None.
    """
    row, chunk, part = (lax.axis_index(name) for name in ("row", "chunk", "part"))
    each = sizes.heads // (sizes.groups * parts)
    first, here = part * each, pl.ds(chunk * CHUNK, CHUNK)

    def copy(index: Any, stage: Any) -> None:
        for source, to in of_head(row, chunk, first + index, here):
            plgpu.copy_gmem_to_smem(source, to.at[stage], refs.ready.at[stage])

    def copy_all() -> None:
        group = lax.div(part, jnp.int32(parts))
        for source, to in ((refs.b, refs.b_shared), (refs.c, refs.c_shared)):
            plgpu.copy_gmem_to_smem(source.at[row, here, group], to, refs.once)
        plgpu.copy_gmem_to_smem(refs.scores.at[row, chunk, group], refs.scores_shared, refs.once)
        keep_full(each, stages, refs.free, copy)

    def compute(warpgroup: Any) -> None:
        mine = positions(chunk, warpgroup)
        own_reach = None if reach is None else target.load(reach.at[row, mine], ROWS)
        plgpu.barrier_wait(refs.once)
        add = functools.partial(step, (row, first, mine, warpgroup), own_reach)
        total = lax.fori_loop(0, each, add, target.full((WARPGROUP_ROWS, sizes.size), 0.0))
        own = shared.at[half(warpgroup)]
        own[...] = total.astype(sizes.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, out.at[row, mine, part])
        plgpu.wait_smem_to_gmem(0)

    share_out(target, compute, copy_all)


def keep_full(steps: int, stages: int, free: Any, copy: Callable[[Any, Any], None]) -> None:
    """Copies what a step needs (step, stage) as soon as its stage is free."""

    def step(index: Any, _: None) -> None:
        stage = stage_of(index, stages)
        pl.when(index >= stages)(functools.partial(plgpu.barrier_wait, free.at[stage]))
        copy(index, stage)

    def drain(index: Any, _: None) -> None:
        plgpu.barrier_wait(free.at[stage_of(index, stages)])

    lax.fori_loop(0, steps, step, None)
    # a block ends only when every arrival was seen
    lax.fori_loop(max(steps - stages, 0), steps, drain, None)


def stage_of(step: Any, stages: int) -> Any:
    """Where a step's operands lie."""
    return lax.rem(step, jnp.int32(stages))


def half(warpgroup: Any) -> Any:
    """A warpgroup's rows of a chunk."""
    return pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def positions(chunk: Any, warpgroup: Any) -> Any:
    """A warpgroup's rows of a chunk in the sequence."""
    return pl.ds(chunk * CHUNK + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def meet(meeting: Any) -> None:
    """Both warpgroups that compute wait for each other."""
    plgpu.barrier_arrive(meeting)
    plgpu.barrier_wait(meeting)


def values_of(target: Target, ref: Any) -> Any:
    """A matrix of shared memory in registers, in float32."""
    return target.place(ref[...].astype(jnp.float32), TILE)


def state_of(target: Target, ref: Any) -> Any:
    """64 rows of a state in global memory, of a type that does not vary over a mesh: a sum's."""
    return target.load(ref, TILE) + target.full((WARPGROUP_ROWS, WIDTH), 0.0)


def scalar(ref: Any, *index: Any) -> Any:
    """A number of global memory, of a type that does not vary over a mesh."""
    return lax.add(ref[index], jnp.zeros((), ref.dtype))


def decay_between(
    target: Target, logs: Any, first_row: Any, first_column: Any, reach: Any, *, rows_are_inputs: bool
) -> Any:
    """exp2 of a tile of logarithms; 0 where an output's position is before the input's or in another document.

    `reach` says how many columns from the diagonal on, itself included, a row has in its document; none: all. One
    unsigned comparison does both, which takes fewer registers than two.
    """
    distance = target.iota(logs.shape, 1) - target.iota(logs.shape, 0) + (first_column - first_row)
    distance = distance if rows_are_inputs else -distance
    if reach is None:
        counts = distance >= 0
    else:
        counts = distance.astype(jnp.uint32) < spread(reach, logs.shape, 0)
    # before the exponential: of a later input it may be infinite
    return jnp.exp2(jnp.where(counts, logs, -jnp.inf))

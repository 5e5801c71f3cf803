"""The loop that both grouped kernels for Hopper are: blocks that stay on their processor and take tile after tile.

One warpgroup copies operands by TMA, always some stages ahead, also into the next tile of the result; two others each
multiply 64 rows of a tile of 128, whose sums stay in their registers until all steps are done. Tiles are dealt out to
the blocks in turn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtron.kernels.grouped_matmul.spec import TILE
from jaxtron.kernels.mosaic import WARPGROUP_ROWS, Refs, Registers, Target, plgpu, swizzled
from jaxtron.typing import Array, DTypeLike

WARPGROUPS = TILE // WARPGROUP_ROWS
DEPTH = 64
"""What a step adds up: rows of 128 bytes, the widest swizzle."""
STAGES = 4
_REGISTERS = Registers(WARPGROUPS, memory=40)
# a row's bytes of what is staged on its way out, by the widest swizzle that the result's rows are a multiple of
_PIECE_BYTES = (128, 64, 32)
# tiles of rows among which tiles of columns are taken in turn: what 132 processors read at a time is then least
_GROUP = 16
_WIDTHS = (256, 192, 128, 64)


def tile_columns(width: int, widths: tuple[int, ...] = _WIDTHS) -> int:
    """Columns of a tile of a result of this width: those with which least is read of operands, beyond the end too."""
    return min(widths, key=lambda columns: pl.cdiv(width, columns) * columns * (1 / TILE + 1 / columns))


@dataclass(frozen=True)
class ResultTile:
    """What is to be done for one tile of a result."""

    steps: Any
    """Products of `DEPTH` that are added up."""
    copy: Callable[[Any, Any], None]
    """Starts the two copies of a step's operands into a stage (step, stage), both of which arrive at `ready`."""
    result: Callable[[Any, int, int], Any]
    """Where a warpgroup's columns go in global memory (warpgroup, first column, number of columns)."""


@runtime_checkable
class TiledProducts(Protocol):
    """What one kernel computes."""

    @property
    def tiles(self) -> Any:
        """Tiles of the result that have products."""
        ...

    def tile(self, number: Any) -> ResultTile:
        """The tile of this number."""
        ...

    def operands(self, stage: Any, warpgroup: Any) -> tuple[Any, Any]:
        """What a warpgroup multiplies of a stage: [64, DEPTH] and [DEPTH, columns]."""
        ...


@dataclass(frozen=True)
class Block:
    """What every block has: sizes, shared memory, barriers."""

    blocks: int
    columns: int
    """Of a tile of the result."""
    out_dtype: DTypeLike
    piece: int
    """Columns that leave at a time."""
    sends: Callable[[Any, Any], None] | None = None
    """How they leave, from shared memory to their place in global memory; none: copied there."""

    @classmethod
    def of(cls, width: int, dtype: DTypeLike, tiles_down: int, blocks: int) -> "Block":
        """For a result of so many columns and tiles of rows, on as many processors as `blocks`."""
        columns, itemsize = tile_columns(width), jnp.dtype(dtype).itemsize
        piece = next(size for size in _PIECE_BYTES if width * itemsize % size == 0) // itemsize
        return cls(min(blocks, tiles_down * pl.cdiv(width, columns)), columns, dtype, piece)

    def scratch(self, left: tuple[tuple[int, int], Array], right: tuple[tuple[int, int], Array]) -> dict[str, Any]:
        """Shared memory and barriers: stages of operands, each given by its shape and what it is a part of."""
        # one swizzle for both, which a product asks for, by the rows that they are copied from
        dtype, width = left[1].dtype, math.gcd(left[1].shape[-1], right[1].shape[-1])

        def stages(shape: tuple[int, int]) -> Any:
            return plgpu.SMEM((STAGES, *shape), dtype, transforms=swizzled(dtype, width))

        pieces = (WARPGROUPS, 2, WARPGROUP_ROWS, self.piece)
        return {
            "left_shared": stages(left[0]),
            "right_shared": stages(right[0]),
            "out_shared": plgpu.SMEM(pieces, self.out_dtype, transforms=swizzled(self.out_dtype, self.piece)),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        }

    def run(self, refs: Refs, work: TiledProducts, target: Target, rest: Callable[[Any, Any], None]) -> None:
        """The kernel's body: all of this block's tiles; `rest` of (block, warpgroup) is what else they store."""
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        own = self.share(work.tiles, block)

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            target.registers(_REGISTERS, memory=False)

            def multiply(index: Any, done: Any) -> Any:
                tile = work.tile(index * self.blocks + block)
                made = self._multiply(refs, work, tile, warpgroup, done)
                self.store(refs, made, tile, warpgroup)
                return done + tile.steps

            lax.fori_loop(0, own, multiply, jnp.int32(0))
            rest(block, warpgroup)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            target.registers(_REGISTERS, memory=True)
            _copy(refs, lambda index: work.tile(index * self.blocks + block), own)

    def share(self, tiles: Any, block: Any) -> Any:
        """How many of so many tiles are a block's."""
        return lax.div(tiles - block + (self.blocks - 1), jnp.int32(self.blocks))

    def _multiply(self, refs: Refs, work: Any, tile: Any, warpgroup: Any, done: Any) -> Any:
        """The sum over a tile's steps, before which there were `done`, as `_piece_of` takes it."""

        def add(sums: Any) -> Array:
            def step(index: Any, _: None) -> None:
                stage = _stage(done + index)
                plgpu.barrier_wait(refs.ready.at[stage])
                plgpu.wgmma(sums, *work.operands(stage, warpgroup))
                # the product before this one is done then, and has read its operands
                plgpu.wgmma_wait(1)

                @pl.when(index > 0)
                def _() -> None:
                    plgpu.barrier_arrive(refs.free.at[_stage(done + index - 1)])

            lax.fori_loop(0, tile.steps, step, None)
            # waits for the last one
            return sums[...]

        made = pl.run_scoped(add, plgpu.ACC((WARPGROUP_ROWS, self.columns), jnp.float32))

        @pl.when(tile.steps > 0)
        def _() -> None:
            plgpu.barrier_arrive(refs.free.at[_stage(done + tile.steps - 1)])

        return made

    def _piece_of(self, made: Any, first: int) -> Array:
        """Columns of the sums that leave together."""
        return made[:, first : first + self.piece]

    def store(self, refs: Refs, made: Any, tile: ResultTile, warpgroup: Any) -> None:
        """A warpgroup's part of a tile to global memory, piece by piece; what lies beyond the result is left out."""
        for number in range(self.columns // self.piece):
            # what the place held has left: before the first piece all of the last tile, then all but the last piece
            if number != 1:
                plgpu.wait_smem_to_gmem(min(number, 1), wait_read_only=True)
            shared = refs.out_shared.at[warpgroup, number % 2]
            first = number * self.piece
            shared[...] = self._piece_of(made, first).astype(shared.dtype)
            plgpu.commit_smem()
            send = self.sends or plgpu.copy_smem_to_gmem
            send(shared, tile.result(warpgroup, first, self.piece))


def _copy(refs: Refs, tile_of: Callable[[Any], ResultTile], own: Any) -> None:
    """Keeps the stages full."""

    def copy(index: Any, done: Any) -> Any:
        tile = tile_of(index)

        def step(index: Any, _: None) -> None:
            stage = _stage(done + index)

            @pl.when(done + index >= STAGES)
            def _() -> None:
                plgpu.barrier_wait(refs.free.at[stage])

            tile.copy(index, stage)

        lax.fori_loop(0, tile.steps, step, None)
        return done + tile.steps

    done = lax.fori_loop(0, own, copy, jnp.int32(0))

    def drain(index: Any, _: None) -> None:
        plgpu.barrier_wait(refs.free.at[_stage(index)])

    # a block ends only when every arrival was seen
    lax.fori_loop(lax.max(done - STAGES, jnp.int32(0)), done, drain, None)


def place(index: Any, rows: Any, columns: int) -> tuple[Any, Any]:
    """Tile of rows and tile of columns of the `index`-th tile of a result of so many: down a group of rows, then on."""
    group = lax.div(index, jnp.int32(_GROUP * columns))
    height = lax.min(rows - group * _GROUP, jnp.int32(_GROUP))
    within = index - group * (_GROUP * columns)
    return group * _GROUP + lax.rem(within, height), lax.div(within, height)


def _stage(step: Any) -> Any:
    return lax.rem(step, jnp.int32(STAGES))

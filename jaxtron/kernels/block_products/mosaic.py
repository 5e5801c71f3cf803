"""`mosaic`: products of e4m3 numbers for Hopper GPUs (sm_90a), whose scales go in between blocks of 128.

The tensor cores add up 128 products with few bits; what they made is then scaled and added to float32 sums in registers
(DeepSeek-V3, 2412.19437, 3.3.2). Both operands have what is contracted last, as tensor cores want 8-bit numbers. The
grouped products' loop with other steps: while one warpgroup scales, the other multiplies.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtron.kernels.block_products.rounding import E4M3
from jaxtron.kernels.block_products.spec import BLOCK, Operand, Rounded
from jaxtron.kernels.grouped_matmul.mosaic_pipeline import STAGES, WARPGROUPS, Block, ResultTile, place, tile_columns
from jaxtron.kernels.mosaic import (
    COLUMNS,
    ROWS,
    WARPGROUP_ROWS,
    Refs,
    Target,
    not_hopper,
    plgpu,
    processors,
    run_kernel,
    spread,
    swizzled,
    transposed,
    unhoisted,
)
from jaxtron.typing import Array, DTypeLike, Float

# how the kernel is named in compiled programs
PRODUCT = "block_product"
# of 16 bits: the narrowest piece of a result's rows that TMA copies through swizzled memory
_ALIGNED = 16
# of a tile, which is 128 high
_WIDTHS = (256, 128, 64)
# columns of a tile that leave at a time: more would not fit into shared memory beside four stages
_PIECE = 32
# columns that are multiplied at a time, with one scale and with a scale each: their products, sums and scales are in
# registers
_OF_BLOCK, _OF_TILES = 64, 64


def unsupported_reason(left: Operand, right: Operand, dtype: DTypeLike, device_kind: str) -> str | None:
    """Why this kernel cannot make products of such shapes in this type on such devices, or None if it can."""
    if (reason := not_hopper(device_kind)) is not None:
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"its kernel makes bfloat16, not {jnp.dtype(dtype)}"
    (_, rows, depth), columns = left.values.shape, right.values.shape[1]
    if 0 in (rows, depth, columns):
        return "its kernel takes no empty arrays"
    if columns % _ALIGNED:
        return f"its kernel takes results whose width is a multiple of {_ALIGNED}, not {columns:,}"
    return None


def product(
    left: Rounded, right: Rounded, dtype: DTypeLike, *, interpret: Any = None, blocks: int | None = None
) -> Float[Array, "M N"]:
    """The sum over all that is contracted of both; `interpret` takes `InterpretGPUParams` to run on a CPU, in
    `blocks`."""
    (parts, rows, depth), columns, target = left.values.shape, right.values.shape[1], Target(interpret)
    by_tiles = right.scales.shape[2] == columns and columns > 1
    wide = tile_columns(columns, _WIDTHS)
    number = min(blocks or processors(), pl.cdiv(rows, BLOCK) * pl.cdiv(columns, wide))
    block = _Scaled(number, wide, dtype, _PIECE if columns % _PIECE == 0 else _ALIGNED, target=target)
    made = run_kernel(
        lambda refs: block.run(refs, _Product(refs, block, by_tiles), target, lambda block, warpgroup: None),
        inputs={
            # of what is contracted whole blocks: the layout of shared memory has no shorter ones
            "left": _padded(left.values, BLOCK),
            "left_scales": _padded(left.scales, BLOCK),
            "right": _padded(right.values, BLOCK),
            "right_scales": _padded(right.scales, block.columns) if by_tiles else right.scales,
        },
        outputs={"out": jax.ShapeDtypeStruct((rows, columns), jnp.dtype(dtype))},
        scratch=block.room(by_tiles),
        grid={"block": block.blocks},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name=PRODUCT,
        flops=2 * parts * rows * columns * depth,
    )
    return made["out"]


@dataclass(frozen=True)
class _Scaled(Block):
    """A block whose steps scale what they multiplied."""

    target: Target = Target()

    def room(self, by_tiles: bool) -> dict[str, Any]:
        """Shared memory and barriers."""

        def stages(*shape: int) -> Any:
            return plgpu.SMEM((STAGES, *shape, BLOCK), E4M3, transforms=swizzled(E4M3, BLOCK))

        pieces = (WARPGROUPS, 2, WARPGROUP_ROWS, self.piece)
        return {
            "left_shared": stages(BLOCK),
            "right_shared": stages(self.columns),
            "left_scales_shared": plgpu.SMEM((STAGES, BLOCK), jnp.float32),
            "right_scales_shared": plgpu.SMEM((STAGES, self.columns), jnp.float32) if by_tiles else None,
            "out_shared": plgpu.SMEM(pieces, self.out_dtype, transforms=swizzled(self.out_dtype, self.piece)),
            "ready": plgpu.Barrier(num_arrivals=4 if by_tiles else 3, num_barriers=STAGES),
            "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        }

    def _multiply(self, refs: Refs, work: "_Product", tile: "_Tile", warpgroup: Any, done: Any) -> list[Array]:
        """The sums over a tile's steps, before which there were `done`, by their columns."""
        width = work.width

        def step(index: Any, sums: list[Array]) -> list[Array]:
            stage = lax.rem(done + index, jnp.int32(STAGES))
            plgpu.barrier_wait(refs.ready.at[stage])
            half = warpgroup + unhoisted(index)
            left, right = work.operands(stage, half)
            of_rows = self.target.load(refs.left_scales_shared.at[stage, _half(half)], ROWS)
            added = []
            for number, total in enumerate(sums):
                columns = pl.ds(number * width, width)
                of_columns = (
                    self.target.load(refs.right_scales_shared.at[stage, columns], COLUMNS)
                    if work.by_tiles
                    else work.block_scale(tile, index, number)
                )
                made = self.target.product(left, transposed(right.at[columns]))
                if number == len(sums) - 1:
                    # scales are read by ordinary loads, before copies that overwrite them
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(refs.free.at[stage])
                if work.by_tiles:
                    scaled = spread(of_rows, made.shape, 0) * spread(of_columns, made.shape, 1)
                else:
                    scaled = spread(of_rows * of_columns, made.shape, 0)
                added.append(total + made * scaled)
            return added

        zeros = [self.target.full((WARPGROUP_ROWS, width), 0.0) for _ in range(self.columns // width)]
        return lax.fori_loop(0, tile.steps, step, zeros)

    def _piece_of(self, made: list[Array], first: int) -> Array:
        """Columns of the sums that leave together."""
        width = made[0].shape[1]
        return made[first // width][:, first % width : first % width + self.piece]


@dataclass(frozen=True)
class _Tile(ResultTile):
    """A tile of the product and the first of its columns."""

    start: Any


@dataclass(frozen=True)
class _Product:
    """Rows of both, along what is contracted: `mosaic_pipeline.TiledProducts`."""

    refs: Refs
    block: _Scaled
    by_tiles: bool
    """Whether the right's rows have a scale each."""

    @property
    def width(self) -> int:
        """Columns that are multiplied at a time."""
        return min(self.block.columns, _OF_TILES if self.by_tiles else _OF_BLOCK)

    @property
    def shape(self) -> tuple[int, int]:
        """Tiles of the product down and across."""
        rows, columns = self.refs.out.shape
        return pl.cdiv(rows, BLOCK), pl.cdiv(columns, self.block.columns)

    @property
    def tiles(self) -> Any:
        """All of them."""
        return jnp.int32(self.shape[0] * self.shape[1])

    def tile(self, number: Any) -> _Tile:
        """Some rows of each operand, over all parts; what lies beyond their ends is filled with zeros."""
        refs = self.refs
        down, across = place(number, jnp.int32(self.shape[0]), self.shape[1])
        start = across * self.block.columns
        rows, columns = pl.ds(down * BLOCK, BLOCK), pl.ds(start, self.block.columns)

        def copy(step: Any, stage: Any) -> None:
            part, inside = self._within(step)
            depth, ready = pl.ds(inside * BLOCK, BLOCK), refs.ready.at[stage]
            plgpu.copy_gmem_to_smem(refs.left.at[part, rows, depth], refs.left_shared.at[stage], ready)
            plgpu.copy_gmem_to_smem(refs.right.at[part, columns, depth], refs.right_shared.at[stage], ready)
            plgpu.copy_gmem_to_smem(refs.left_scales.at[part, inside, rows], refs.left_scales_shared.at[stage], ready)
            if self.by_tiles:
                scales = refs.right_scales.at[part, inside, columns]
                plgpu.copy_gmem_to_smem(scales, refs.right_scales_shared.at[stage], ready)

        def result(warpgroup: Any, first: int, columns: int) -> Any:
            rows = pl.ds(down * BLOCK + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            return refs.out.at[rows, pl.ds(start + first, columns)]

        return _Tile(jnp.int32(refs.left.shape[0] * self._each), copy, result, start)

    def operands(self, stage: Any, warpgroup: Any) -> tuple[Any, Any]:
        """64 rows, and all columns as rows."""
        return self.refs.left_shared.at[stage, _half(warpgroup)], self.refs.right_shared.at[stage]

    def block_scale(self, tile: _Tile, step: Any, number: int) -> Any:
        """Of the columns that are multiplied as this many."""
        part, inside = self._within(step)
        across = lax.div(tile.start + number * self.width, jnp.int32(BLOCK))
        last = jnp.int32(self.refs.right_scales.shape[2] - 1)
        # columns beyond the end have none
        found = self.refs.right_scales[part, inside, lax.min(across, last)]
        # as in the grouped products: a sum has no type that varies
        return lax.add(found, jnp.float32(0.0))

    @property
    def _each(self) -> int:
        """Steps of a part."""
        return pl.cdiv(self.refs.left.shape[2], BLOCK)

    def _within(self, step: Any) -> tuple[Any, Any]:
        """Part and block of a step."""
        each = jnp.int32(self._each)
        return lax.div(step, each), lax.rem(step, each)


def _half(warpgroup: Any) -> Any:
    """A warpgroup's rows of a tile."""
    return pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def _padded(array: Array, multiple: int) -> Array:
    """With zeros behind the last dimension."""
    missing = -array.shape[2] % multiple
    return jnp.pad(array, ((0, 0), (0, 0), (0, missing))) if missing else array

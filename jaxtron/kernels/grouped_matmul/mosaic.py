"""`mosaic`: grouped products for Hopper GPUs (sm_90a), in Pallas on Mosaic GPU.

Kernels are read as they lie, also transposed: no copy of them is made. Widths need not be whole tiles: copies fill what
lies beyond the end with zeros, and leave it out on the way back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtron.kernels.grouped_matmul.mosaic_pipeline import (
    DEPTH,
    WARPGROUPS,
    Block,
    ResultTile,
    place,
)
from jaxtron.kernels.grouped_matmul.spec import TILE, Operand
from jaxtron.kernels.mosaic import WARPGROUP_ROWS, Refs, Target, not_hopper, plgpu, processors, run_kernel, transposed
from jaxtron.typing import Array, Float, Int

# of 16 bits: the narrowest piece of a result's rows that TMA copies through swizzled memory
_ALIGNED = 16


def unsupported_reason(rows: Operand, kernel: Operand, device_kind: str) -> str | None:
    """Why these kernels cannot compute arrays of such sizes and types on such devices, or None if they can."""
    if (reason := not_hopper(device_kind)) is not None:
        return reason
    if jnp.dtype(rows.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"its kernels take bfloat16 and float16, not {rows.dtype}"
    if any(width % _ALIGNED for width in kernel.shape[1:]):
        return (
            f"its kernels take widths that are multiples of {_ALIGNED}, not {kernel.shape[1]:,} x {kernel.shape[2]:,}"
        )
    if 0 in (*rows.shape, *kernel.shape):
        return "its kernels take no empty arrays"
    return None


def product(
    rows: Float[Array, "R I"],
    kernel: Float[Array, "N I O"],
    tile_experts: Int[Array, " tiles"],
    *,
    interpret: Any = None,
    blocks: int | None = None,
) -> Float[Array, "R O"]:
    """Each row times the kernel of its expert; `interpret` takes `InterpretGPUParams` to run on a CPU, in `blocks`."""
    return _products(rows, kernel, tile_experts, kernel.shape[2], False, Target(interpret), blocks)


def product_transposed(
    rows: Float[Array, "R O"],
    kernel: Float[Array, "N I O"],
    tile_experts: Int[Array, " tiles"],
    *,
    interpret: Any = None,
    blocks: int | None = None,
) -> Float[Array, "R I"]:
    """Each row times the transpose of its expert's kernel, which the tensor cores read by columns."""
    return _products(rows, kernel, tile_experts, kernel.shape[1], True, Target(interpret), blocks)


def gradient(
    rows: Float[Array, "R I"],
    cotangent: Float[Array, "R O"],
    tile_experts: Int[Array, " tiles"],
    num_experts: int,
    *,
    interpret: Any = None,
    blocks: int | None = None,
) -> Float[Array, "N I O"]:
    """Of each expert its rows' transpose times their cotangent: rows are read by columns in shared memory."""
    (total, width), out, target = rows.shape, cotangent.shape[1], Target(interpret)
    block = Block.of(out, jnp.float32, num_experts * pl.cdiv(width, TILE), blocks or processors())
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    made = run_kernel(
        lambda refs: block.run(refs, _Gradient(refs, block), target, lambda block, warpgroup: None),
        inputs={
            "starts": jnp.searchsorted(tile_experts, experts).astype(jnp.int32),
            "rows": rows,
            "cotangent": cotangent,
        },
        outputs={"out": jax.ShapeDtypeStruct((num_experts, width, out), jnp.float32)},
        scratch=block.scratch(((DEPTH, TILE), rows), ((DEPTH, block.columns), cotangent)),
        grid={"block": block.blocks},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name="grouped_gradient",
        flops=2 * total * width * out,
    )
    return made["out"]


def _products(
    rows: Array, kernel: Array, tile_experts: Array, out: int, by_columns: bool, target: Target, blocks: int | None
) -> Array:
    total, width = rows.shape
    block = Block.of(out, rows.dtype, total // TILE, blocks or processors())
    shape = (block.columns, DEPTH) if by_columns else (DEPTH, block.columns)

    def body(refs: Refs) -> None:
        work = _Products(refs, block, by_columns, _scalar(refs.used, 0))
        block.run(refs, work, target, lambda number, warpgroup: work.clear(number, warpgroup, target))

    made = run_kernel(
        body,
        inputs={
            "experts": tile_experts,
            "used": jnp.sum(tile_experts < kernel.shape[0], dtype=jnp.int32)[None],
            "rows": rows,
            "kernel": kernel,
        },
        outputs={"out": jax.ShapeDtypeStruct((total, out), rows.dtype)},
        scratch=block.scratch(((TILE, DEPTH), rows), (shape, kernel)),
        grid={"block": block.blocks},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name="grouped_product_transposed" if by_columns else "grouped_product",
        flops=2 * total * width * out,
    )
    return made["out"]


@dataclass(frozen=True)
class _Products:
    """Rows times kernels: `mosaic_pipeline.TiledProducts`."""

    refs: Refs
    block: Block
    by_columns: bool
    """Whether kernels are read so."""
    used: Any
    """Tiles of rows that have an expert."""

    @property
    def across(self) -> int:
        """Tiles of the result's columns."""
        return pl.cdiv(self.refs.out.shape[1], self.block.columns)

    @property
    def tiles(self) -> Any:
        """Tiles of the result that have products."""
        return self.used * self.across

    def tile(self, number: Any) -> ResultTile:
        """Rows of one expert, and columns of its kernel."""
        refs = self.refs
        down, across = place(number, self.used, self.across)
        expert = _scalar(refs.experts, down)
        rows, columns = pl.ds(down * TILE, TILE), pl.ds(across * self.block.columns, self.block.columns)

        def copy(step: Any, stage: Any) -> None:
            depth = pl.ds(step * DEPTH, DEPTH)
            kernel = refs.kernel.at[(expert, columns, depth) if self.by_columns else (expert, depth, columns)]
            plgpu.copy_gmem_to_smem(refs.rows.at[rows, depth], refs.left_shared.at[stage], refs.ready.at[stage])
            plgpu.copy_gmem_to_smem(kernel, refs.right_shared.at[stage], refs.ready.at[stage])

        # the end of a width that is no multiple is filled with zeros
        steps = jnp.int32(pl.cdiv(refs.rows.shape[1], DEPTH))
        return ResultTile(steps, copy, self._result(down, across))

    def operands(self, stage: Any, warpgroup: Any) -> tuple[Any, Any]:
        """64 rows, and the kernel."""
        right = self.refs.right_shared.at[stage]
        return self.refs.left_shared.at[stage, _half(warpgroup)], transposed(right) if self.by_columns else right

    def clear(self, block: Any, warpgroup: Any, target: Target) -> None:
        """Zeros in tiles of rows without an expert, dealt out to the blocks too."""
        zeros = target.full((WARPGROUP_ROWS, self.block.columns), 0.0)
        count = jnp.int32(self.refs.rows.shape[0] // TILE) - self.used

        def clear(index: Any, _: None) -> None:
            number, across = index * self.block.blocks + block, jnp.int32(self.across)
            result = self._result(self.used + lax.div(number, across), lax.rem(number, across))
            self.block.store(self.refs, zeros, ResultTile(0, lambda step, stage: None, result), warpgroup)

        lax.fori_loop(0, self.block.share(count * self.across, block), clear, None)

    def _result(self, down: Any, across: Any) -> Callable[[Any, int, int], Any]:
        def result(warpgroup: Any, first: int, columns: int) -> Any:
            rows = pl.ds(down * TILE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            return self.refs.out.at[rows, pl.ds(across * self.block.columns + first, columns)]

        return result


@dataclass(frozen=True)
class _Gradient:
    """Rows' transpose times their cotangent, by expert: `mosaic_pipeline.TiledProducts`."""

    refs: Refs
    block: Block

    @property
    def shape(self) -> tuple[int, int]:
        """Tiles of a kernel down and across."""
        _, width, out = self.refs.out.shape
        return pl.cdiv(width, TILE), pl.cdiv(out, self.block.columns)

    @property
    def tiles(self) -> Any:
        """All of the result: an expert without rows has zeros."""
        return jnp.int32(self.refs.out.shape[0] * math.prod(self.shape))

    def tile(self, number: Any) -> ResultTile:
        """A part of one expert's kernel, over all rows of the expert."""
        refs, each = self.refs, jnp.int32(math.prod(self.shape))
        expert = lax.div(number, each)
        down, across = place(lax.rem(number, each), jnp.int32(self.shape[0]), self.shape[1])
        first, end = (_scalar(refs.starts, at) for at in (expert, expert + 1))
        start = across * self.block.columns

        def copy(step: Any, stage: Any) -> None:
            rows = pl.ds(first * TILE + step * DEPTH, DEPTH)
            left = refs.rows.at[rows, pl.ds(down * TILE, TILE)]
            plgpu.copy_gmem_to_smem(left, refs.left_shared.at[stage], refs.ready.at[stage])
            right = refs.cotangent.at[rows, pl.ds(start, self.block.columns)]
            plgpu.copy_gmem_to_smem(right, refs.right_shared.at[stage], refs.ready.at[stage])

        def result(warpgroup: Any, first: int, columns: int) -> Any:
            rows = pl.ds(down * TILE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            return refs.out.at[expert, rows, pl.ds(start + first, columns)]

        return ResultTile((end - first) * (TILE // DEPTH), copy, result)

    def operands(self, stage: Any, warpgroup: Any) -> tuple[Any, Any]:
        """64 columns of the rows, and the cotangent."""
        return transposed(self.refs.left_shared.at[stage, :, _half(warpgroup)]), self.refs.right_shared.at[stage]


def _half(warpgroup: Any) -> Any:
    """A warpgroup's part of a tile."""
    return pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def _scalar(ref: Any, index: Any) -> Any:
    # inside a `jax.shard_map` what is read has a type that varies, and what loops make of it has not; a sum has none
    return lax.add(ref[index], jnp.int32(0))

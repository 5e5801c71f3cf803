"""`mosaic`: products for Hopper GPUs (sm_90a) that add what they make to float32 sums, in place, by TMA.

A product and a sum apart write a gradient, read it again, and read and write the sum, after the product; here the sum
is read and written alone, beside the products of other tiles. The grouped products' loop with a result that stays.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxtron.kernels.grouped_matmul.mosaic_pipeline import DEPTH, WARPGROUPS, Block, ResultTile, place
from jaxtron.kernels.grouped_matmul.spec import TILE
from jaxtron.kernels.mosaic import WARPGROUP_ROWS, Refs, Target, not_hopper, plgpu, processors, run_kernel, transposed
from jaxtron.kernels.varying import vary_alike
from jaxtron.kernels.weight_sums.spec import Operand
from jaxtron.typing import Array, Float, Int

# how the kernel is named in compiled programs
SUM = "weight_sum"
# of 16 bits: what TMA asks of the bytes of a row
_ALIGNED = 16
_MOST_ROWS = 4096
"""At so many a sum apart costs a third of its product: 10 bytes at 2.85 TB/s against 2 x rows FLOPs at 742 TFLOP/s.
These products were never timed: one by a library may be faster. Of halves of a microbatch (`sharding.halves`), whose
two products are added one after the other, it is the rows of one."""
_SPEED = 7e14
"""FLOPs a second, roughly: XLA's scheduler, untold, puts communication beside other products and none beside these.
Attention is not told: llama3_8b_128k would wait 0.13 s longer, for what one of its kernels is then taken to hide."""
_KNOWS_PLACES = (0, 11)
"""The JAX that can trace a kernel which writes in place, inside another trace."""


def unsupported_reason(x: Operand, cotangent: Operand, device_kind: str) -> str | None:
    """Why the kernel cannot add the products of such arrays on such devices, or is not worth it; none: it is."""
    if (reason := not_hopper(device_kind)) is not None:
        return reason
    if jax.__version_info__ < _KNOWS_PLACES:
        return f"its kernels need JAX {'.'.join(map(str, _KNOWS_PLACES))}, not {jax.__version__}"
    if x.dtype != cotangent.dtype or jnp.dtype(x.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"its kernels take bfloat16 and float16, not {x.dtype} and {cotangent.dtype}"
    (rows, width), out = x.shape, cotangent.shape[1]
    if rows > _MOST_ROWS:
        return f"its kernels are worth it up to {_MOST_ROWS:,} rows, not {rows:,}"
    if 0 in (rows, width, out) or width % _ALIGNED or out % _ALIGNED:
        return f"its kernels take widths that are multiples of {_ALIGNED}, not {width:,} x {out:,}"
    return None


def add(
    sums: Float[Array, "L I O"],
    x: Float[Array, "R I"],
    cotangent: Float[Array, "R O"],
    slot: Int[Array, ""],
    *,
    interpret: Any = None,
    blocks: int | None = None,
) -> Float[Array, "L I O"]:
    """`sums` with `x^T cotangent` added at `slot`; `interpret` takes `InterpretGPUParams` to run on a CPU."""
    (rows, width), out, target = x.shape, cotangent.shape[1], Target(interpret)
    block = Block.of(out, jnp.float32, pl.cdiv(width, TILE), blocks or processors())
    block = replace(block, sends=functools.partial(plgpu.copy_smem_to_gmem, reduction_op="add"))
    if interpret is not None:
        # the interpreter adds nothing to what lies partly beyond the end
        sums = jnp.pad(sums, ((0, 0), (0, -width % TILE), (0, -out % block.columns)))
    sums, x, cotangent, slot = vary_alike((sums, x, cotangent, slot))
    made = run_kernel(
        lambda refs: block.run(refs, _Sum(refs, block), target, lambda block, warpgroup: None),
        inputs={"slot": slot.astype(jnp.int32)[None], "x": x, "cotangent": cotangent},
        changed={"sums": sums},
        outputs={},
        scratch=block.scratch(((DEPTH, TILE), x), ((DEPTH, block.columns), cotangent)),
        grid={"block": block.blocks},
        warpgroups=WARPGROUPS + 1,
        target=target,
        name=SUM,
        flops=2 * rows * width * out,
        seconds=2 * rows * width * out / _SPEED,
    )
    return made["sums"][:, :width, :out] if interpret is not None else made["sums"]


@dataclass(frozen=True)
class _Sum:
    """`x` transposed times the cotangent: `mosaic_pipeline.TiledProducts`."""

    refs: Refs
    block: Block

    @property
    def shape(self) -> tuple[int, int]:
        """Tiles of the sum down and across."""
        _, width, out = self.refs.sums.shape
        return pl.cdiv(width, TILE), pl.cdiv(out, self.block.columns)

    @property
    def tiles(self) -> Any:
        """All of them."""
        return jnp.int32(math.prod(self.shape))

    def tile(self, number: Any) -> ResultTile:
        """A part of the sum, over all rows; what lies beyond the last of them is filled with zeros."""
        refs = self.refs
        down, across = place(number, jnp.int32(self.shape[0]), self.shape[1])
        start = across * self.block.columns

        def copy(step: Any, stage: Any) -> None:
            rows = pl.ds(step * DEPTH, DEPTH)
            left = refs.x.at[rows, pl.ds(down * TILE, TILE)]
            plgpu.copy_gmem_to_smem(left, refs.left_shared.at[stage], refs.ready.at[stage])
            right = refs.cotangent.at[rows, pl.ds(start, self.block.columns)]
            plgpu.copy_gmem_to_smem(right, refs.right_shared.at[stage], refs.ready.at[stage])

        def result(warpgroup: Any, first: int, columns: int) -> Any:
            rows = pl.ds(down * TILE + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            return refs.sums.at[_slot(refs), rows, pl.ds(start + first, columns)]

        return ResultTile(jnp.int32(pl.cdiv(refs.x.shape[0], DEPTH)), copy, result)

    def operands(self, stage: Any, warpgroup: Any) -> tuple[Any, Any]:
        """64 columns of `x`, and the cotangent."""
        columns = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        return transposed(self.refs.left_shared.at[stage, :, columns]), self.refs.right_shared.at[stage]


def _slot(refs: Refs) -> Any:
    # as in the grouped products: a sum has no type that varies
    return lax.add(refs.slot[0], jnp.int32(0))

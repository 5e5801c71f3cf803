"""What the Mosaic GPU kernels share: the few places where the real lowering and its interpreter differ.

A kernel is one body for both. It is lowered for sm_90a (Hopper: wgmma, TMA) unless it is called with the
interpreter's parameters; then it runs on the CPU, and may look for races. The interpreter knows no layouts, no
tensor-core product of an operand in registers, and no accumulator with a first value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import jaxpr_as_fun

from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array

# what it exports is typed too narrowly
plgpu: Any = mosaic_gpu
TILE = plgpu.Layout.WGMMA
"""How a warpgroup holds a matrix that a tensor-core product made: 64 rows and any columns."""
ROWS = TILE.reduce(1)
"""One number per row of a `TILE`."""
COLUMNS = TILE.reduce(0)
"""One number per column of a `TILE`."""
WARPGROUP_ROWS = 64
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def not_hopper(device_kind: str) -> str | None:
    """Why these kernels do not run on devices of this kind (`jax.Device.device_kind`), or None if they do."""
    return (
        None if any(name in device_kind for name in _HOPPER) else f"its kernels are for Hopper GPUs, not {device_kind}"
    )


def processors() -> int:
    """Multiprocessors of a GPU that the program is traced for, as far as is known: a block stays on each."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "num_cores", None) or 132


def swizzled(dtype: Any, columns: int, widest: int = 128) -> tuple:
    """Shared-memory layout of a matrix that TMA fills and wgmma reads: the widest swizzle that divides its rows."""
    itemsize = jnp.dtype(dtype).itemsize
    for width in (128, 64, 32):
        if width <= widest and columns * itemsize % width == 0:
            return plgpu.TilingTransform((8, width // itemsize)), plgpu.SwizzleTransform(width)
    raise ValueError(f"rows of {columns} {jnp.dtype(dtype).name} fit no swizzle: their bytes must be a multiple of 32")


@dataclass(frozen=True)
class Registers:
    """Registers per thread of a block with one warpgroup that copies and some that compute."""

    warpgroups: int
    """Those that compute."""
    memory: int
    """Of the one that copies; a multiple of 8, 24 at least."""

    @property
    def compute(self) -> int:
        """Of each that computes: what is left of the block's, which every warpgroup gets 1 / number of at the start."""
        started = 65536 // (128 * (self.warpgroups + 1)) // 8 * 8
        return min((started * (self.warpgroups + 1) - self.memory) // self.warpgroups // 8 * 8, 240)


@dataclass(frozen=True)
class Target:
    """What a kernel is traced for: sm_90a, or the interpreter if there are `InterpretGPUParams`."""

    interpret: Any = None

    def place(self, array: Array, layout: Any) -> Array:
        """`array` in the registers as `layout` says."""
        return array if self.interpret else plgpu.layout_cast(array, layout)

    def full(self, shape: tuple[int, ...], value: float, layout: Any = TILE) -> Array:
        """A float32 array of one value."""
        return self.place(jnp.full(shape, value, jnp.float32), layout)

    def iota(self, shape: tuple[int, ...], axis: int) -> Array:
        """Row (axis 0) or column (axis 1) numbers of a tile."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)

    def load(self, ref: Any, layout: Any) -> Array:
        """A vector of shared or global memory, one number per row or column of a tile."""
        if self.interpret:
            return ref[...]
        if jax.__version_info__ >= (0, 11):
            return plgpu.load(ref, layout=layout, optimized=False)
        return plgpu.load(ref, (), layout=layout, optimized=False)

    def registers(self, budget: "Registers", *, memory: bool) -> None:
        """Moves registers from the warpgroup that only issues copies to those that compute."""
        if self.interpret:
            return
        if memory:
            plgpu.set_max_registers(budget.memory, action="decrease")
        else:
            plgpu.set_max_registers(budget.compute, action="increase")

    def product(
        self, left: Any, right: Any, total: Array | None = None, *, issued: Callable[[], None] | None = None
    ) -> Array:
        """`total + left @ right` on the tensor cores, accumulated in float32, waited for.

        `left` is a reference to shared memory or an array in registers, `right` a reference; both may be `transposed`.
        `issued` is called once the product was issued, before it is waited for.
        """
        issued = issued or (lambda: None)
        if self.interpret:
            return self._product_of_values(left, right, total, issued)
        if total is None:

            def fresh(accumulator: Any) -> Array:
                plgpu.wgmma(accumulator, left, right)
                issued()
                return accumulator[...]

            return pl.run_scoped(fresh, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))

        def added(accumulator: Any) -> None:
            plgpu.wgmma(accumulator, left, right)
            issued()

        return pl.run_state(added)(plgpu.ACC.init(total))

    def _product_of_values(self, left: Any, right: Any, total: Array | None, issued: Callable[[], None]) -> Array:
        """The interpreter cannot multiply from registers, and its race detector sees ordinary loads alone."""
        first = left if isinstance(left, jax.Array) else left[...]
        second = right[...]
        # on the GPU the tensor cores read both, which needs no fence before a copy overwrites them
        plgpu.commit_smem()
        made = jnp.dot(first.astype(jnp.float32), second.astype(jnp.float32))
        issued()
        return made if total is None else total + made


def transposed(ref: Any) -> Any:
    """A matrix of shared memory read by columns."""
    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 11) else plgpu.transpose_ref(ref, (1, 0))


def unhoisted(counter: Array) -> Array:
    """0 of any loop counter, which the compiler does not know.

    What is computed from it (the addresses of operands) stays in the loop; taken out, it would fill registers.
    """
    return lax.shift_right_logical(counter, jnp.int32(30))


def spread(vector: Array, shape: tuple[int, ...], axis: int) -> Array:
    """`vector` along `axis` of a tile of `shape`."""
    return lax.broadcast_in_dim(vector, shape, [axis])


class Refs(SimpleNamespace):
    """What a kernel reads, writes and works in, references by name; None where it needs no such thing."""


def run_kernel(
    body: Callable[[Refs], None],
    *,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    scratch: Mapping[str, Any],
    grid: dict[str, int],
    warpgroups: int,
    target: Target,
    name: str,
    flops: int,
    changed: Mapping[str, Array] | None = None,
    seconds: float | None = None,
) -> dict[str, Array]:
    """The outputs by name of a Mosaic GPU kernel, whose body gets all sorts by their names.

    What is `changed` is read and written in place, and comes out too. None among the others is not there. `grid` names
    the axes of the blocks, `warpgroups` counts those of a block, whose axis is `warpgroup`. The compiled program
    carries `name` and the most `flops` of its products, which its text does not show. `seconds` are those that XLA's
    scheduler counts it as (none: ten microseconds, as it does any call).
    """
    changed = changed or {}
    absent = dict.fromkeys(key for sort in (inputs, outputs, scratch) for key, part in sort.items() if part is None)
    given, made, kept = (
        {key: part for key, part in sort.items() if part is not None} for sort in (inputs, outputs, scratch)
    )

    def by_name(*refs: Any) -> None:
        body(Refs(**absent, **dict(zip((*given, *changed, *made, *kept), refs, strict=True))))

    run = plgpu.kernel(
        by_name,
        out_type=list(made.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=list(kept.values()),
        interpret=target.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )

    told = {} if seconds is None else {"latency_metadata": str(round(1e9 * seconds))}

    @set_xla_metadata(**told)
    @jax.named_scope(f"mosaic.{name}.flops{flops}")
    def call(inputs: list[Any], arrays: list[Array]) -> list[Array]:
        made = _in_place(run, inputs, arrays) if arrays else run(*inputs)
        # a kernel's outputs are typed as the same on all devices, whatever its inputs are
        return vary_alike((made, inputs))[0]

    return dict(zip((*made, *changed), call([*given.values()], [*changed.values()]), strict=True))


def _in_place(run: Callable[..., list[Array]], inputs: list[Any], arrays: list[Array]) -> list[Array]:
    """What a kernel makes of `inputs`, and `arrays` as it leaves them where they are.

    Kernels take no references whose type says that devices differ: it is traced with arrays of which that is not said.
    """

    def call(inputs: list[Array], arrays: list[Array]) -> list[Array]:
        places = [jax.new_ref(array) for array in arrays]
        return [*run(*inputs, *places), *(place[...] for place in places)]

    alike = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (inputs, arrays))
    return jaxpr_as_fun(jax.make_jaxpr(jax.jit(call))(*alike))(*inputs, *arrays)

"""Products of 8-bit numbers with scales of blocks (DeepSeek-V3, 2412.19437, 3.3): e4m3 everywhere, sums in float32.

What is contracted is cut into blocks of 128. Inputs and gradients have a scale for each row's 128 numbers, weights for
128 x 128. A weight's gradient contracts rows: its operands are rounded anew, by tiles of 128 rows. Blocks begin where a
device's part does: where parts are multiples of 128 they are those of one device. No device asks another for a maximum.

What is sent over `tensor` goes as 8 bits with its scales: inputs are gathered, and gradients of outputs.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxtron.kernels.block_products import backend
from jaxtron.kernels.block_products.rounding import block_scales, by_blocks, by_columns, by_rows, whole
from jaxtron.kernels.block_products.spec import Rounded
from jaxtron.layers.fp8 import Form
from jaxtron.layers.saved import save_for_backward
from jaxtron.sharding.folding import Axes
from jaxtron.sharding.layout import only, spec_axes
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, DTypeLike, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "..."], kernel: Float[Array, "..."], form: Form) -> Float[Array, "..."]:
    """`x` contracted with the kernel, in the type of `x`; the backward keeps what it is given, and the kernel's
    scales."""
    return _forward(x, kernel, form)[0]


def _forward(x: Array, kernel: Array, form: Form) -> tuple[Array, tuple[Array, ...]]:
    weight = _Weight.of(kernel, x.ndim - form.num_rows)
    scales = over_tensor(lambda kernel: block_scales(weight.flat(kernel)), weight.layout, weight.blocks)(kernel)
    scales = save_for_backward(scales)
    rows = _Rows.of(x, form)
    positions = rows.multiplied(form.multiplied)

    def multiply(values: Array, of_values: Array, kernel: Array, scales: Array) -> Array:
        weights = by_blocks(weight.flat(kernel), scales).T
        made = _multiplied(_joined(values, of_values), whole(weights, scales), x.dtype)
        made = made.reshape(*rows.local(values), *kernel.shape[weight.num_inputs :])
        return _summed(made, weight.inputs, form.output)

    given = (*rows.specs(positions, weight.inputs), weight.layout, weight.blocks)
    natural = rows.arranged(positions, spec_axes(weight.layout)[weight.num_inputs :])
    wanted = _tensor(form.output) if weight.inputs else natural
    made = over_tensor(multiply, given, wanted)(*rows.by_rows(x, positions, weight.inputs), kernel, scales)
    return jax.sharding.reshard(made, form.output), (x, kernel, scales)


def _backward(form: Form, kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array]:
    x, kernel, scales = kept
    weight = _Weight.of(kernel, x.ndim - form.num_rows)
    rows, cotangent, of_x = _Rows.of(x, form), _Rows.of(dy, form), jax.typeof(x).sharding.spec
    positions = cotangent.multiplied(form.gradient)

    def to_x(values: Array, of_values: Array, kernel: Array, scales: Array) -> Array:
        weights = by_blocks(weight.flat(kernel), scales)
        made = _multiplied(_joined(values, of_values), whole(weights, scales.T), x.dtype)
        made = made.reshape(*cotangent.local(values), *kernel.shape[: weight.num_inputs])
        return _summed(made, weight.outputs, of_x)

    given = (*cotangent.specs(positions, weight.outputs), weight.layout, weight.blocks)
    natural = rows.arranged(positions, spec_axes(weight.layout)[: weight.num_inputs])
    wanted = _tensor(of_x) if weight.outputs else natural
    dx = over_tensor(to_x, given, wanted)(*cotangent.by_rows(dy, positions, weight.outputs), kernel, scales)

    def to_kernel(values: Array, of_values: Array, others: Array, of_others: Array) -> Array:
        left, right = _joined_columns(values, of_values), _joined_columns(others, of_others)
        made = _multiplied(left, right, kernel.dtype).reshape(weight.local(kernel))
        return _summed(made, positions, weight.layout)

    # positions that tensor splits in one of the two are runs of both
    parts = max(current().size(one.positions) for one in (rows, cotangent))
    operands = (
        *rows.by_columns(x, positions, weight.inputs, parts),
        *cotangent.by_columns(dy, positions, weight.outputs, parts),
    )
    given = (*rows.column_specs(positions, weight.inputs), *rows.column_specs(positions, weight.outputs))
    dkernel = over_tensor(to_kernel, given, weight.layout)(*operands)
    return jax.sharding.reshard(dx, of_x), jax.sharding.reshard(dkernel, jax.typeof(kernel).sharding.spec)


product.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Weight:
    """How a kernel lies, by tensor's axes alone."""

    num_inputs: int
    layout: PartitionSpec

    @classmethod
    def of(cls, kernel: Array, num_inputs: int) -> "_Weight":
        return cls(num_inputs, _tensor(jax.typeof(kernel).sharding.spec))

    @property
    def inputs(self) -> Axes:
        """What splits what the forward contracts."""
        return _joint(spec_axes(self.layout)[: self.num_inputs])

    @property
    def outputs(self) -> Axes:
        """What splits what it makes."""
        return _joint(spec_axes(self.layout)[self.num_inputs :])

    @property
    def blocks(self) -> PartitionSpec:
        """Of its scales."""
        return PartitionSpec(self.inputs or None, self.outputs or None)

    def flat(self, kernel: Array) -> Array:
        """Inputs by outputs."""
        return kernel.reshape(math.prod(kernel.shape[: self.num_inputs]), -1)

    def local(self, kernel: Array) -> tuple[int, ...]:
        """Shape of a device's part."""
        return tuple(
            size // current().size(axes) for size, axes in zip(kernel.shape, spec_axes(self.layout), strict=True)
        )


@dataclass(frozen=True)
class _Rows:
    """How rows of an array lie, by tensor's axes alone, which split the last dimension of rows if any."""

    num_rows: int
    positions: Axes

    @classmethod
    def of(cls, x: Array, form: Form) -> "_Rows":
        return cls(form.num_rows, cls._positions(jax.typeof(x).sharding.spec, form.num_rows))

    @staticmethod
    def _positions(layout: PartitionSpec, num_rows: int) -> Axes:
        return spec_axes(_tensor(layout))[num_rows - 1]

    def multiplied(self, layout: PartitionSpec) -> Axes:
        """What splits positions in another layout of such an array."""
        return self._positions(layout, self.num_rows)

    def arranged(self, positions: Axes, rest: tuple[Axes, ...]) -> PartitionSpec:
        """Of an array with these rows, split so, and more dimensions."""
        return PartitionSpec(*(None,) * (self.num_rows - 1), positions or None, *(axes or None for axes in rest))

    def local(self, values: Array) -> tuple[int, ...]:
        """Rows of what is made of a device's `values`."""
        return values.shape[2 - self.num_rows : 2]

    def specs(self, positions: Axes, width: Axes) -> tuple[PartitionSpec, PartitionSpec]:
        """Of values and scales by rows."""
        split, along = positions or None, width or None
        return PartitionSpec(None, split, along), PartitionSpec(along, None, split)

    def column_specs(self, positions: Axes, width: Axes) -> tuple[PartitionSpec, PartitionSpec]:
        """Of values and scales by columns."""
        split, along = positions or None, width or None
        return PartitionSpec(split, None, along, None), PartitionSpec(split, None, None, along)

    def by_rows(self, x: Array, positions: Axes, width: Axes) -> tuple[Array, ...]:
        """Rounded where it lies, and then laid out so."""
        return self._rounded(x, by_rows, self.specs, positions, width)

    def by_columns(self, x: Array, positions: Axes, width: Axes, parts: int) -> tuple[Array, ...]:
        """The same by columns, whose positions are so many runs over all devices."""
        runs = parts // current().size(self.positions)
        return self._rounded(x, functools.partial(by_columns, runs=runs), self.column_specs, positions, width)

    def _rounded(
        self, x: Array, rounded: Callable[..., Any], specs: Callable[..., Any], positions: Axes, width: Axes
    ) -> tuple[Array, ...]:
        def local(x: Array) -> tuple[Array, ...]:
            lengths = x.shape[: self.num_rows]
            return rounded(x.reshape(math.prod(lengths[:-1]), lengths[-1], -1))

        found = over_tensor(local, _tensor(jax.typeof(x).sharding.spec), specs(self.positions, width))(x)
        return tuple(map(jax.sharding.reshard, found, specs(positions, width)))


def _joined(values: Array, scales: Array) -> Rounded:
    """All rows of a device as those of one matrix."""
    rows = math.prod(values.shape[:2])
    return whole(values.reshape(rows, -1), scales.reshape(-1, rows))


def _joined_columns(values: Array, scales: Array) -> Rounded:
    """All runs of all rows as parts of what is contracted."""
    return Rounded(*(array.reshape(-1, *array.shape[2:]) for array in (values, scales)))


def _multiplied(left: Rounded, right: Rounded, dtype: DTypeLike) -> Array:
    return backend.product(left, right, dtype, current().device_kind)


def _summed(made: Array, axes: Axes, layout: PartitionSpec) -> Array:
    """The sum over devices that had parts of what was contracted, laid out so."""
    if not axes:
        return made
    dim = next((dim for dim, own in enumerate(spec_axes(_tensor(layout))) if own == axes), None)
    return (
        jax.lax.psum(made, axes) if dim is None else jax.lax.psum_scatter(made, axes, scatter_dimension=dim, tiled=True)
    )


def _tensor(layout: PartitionSpec) -> PartitionSpec:
    return only(layout, current().axes("tensor"))


def _joint(dims: tuple[Axes, ...]) -> Axes:
    """The axes that split some dimensions, at most one of them."""
    return next((axes for axes in dims if axes), ())

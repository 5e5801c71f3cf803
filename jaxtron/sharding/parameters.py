"""Parameters: created with logical axes, stored in parts, gathered where they are used."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.roles import Role, Status
from jaxtron.sharding.collectives import all_gather, all_reduce, manual_axes, reduce_scatter, vary
from jaxtron.sharding.folding import Axes
from jaxtron.sharding.layout import Layout, only, spec_axes
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, PyTree

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], Array]


@dataclass(frozen=True)
class ParameterSpec:
    """All that is known of a parameter, or a buffer, without its values; `axes` names its dimensions, `layers` first if
    stacked."""

    dtype: jnp.dtype
    axes: tuple[str, ...]
    role: Role
    layout: Layout
    layers: int | None = None
    """Of those that are stacked the layers among their rows, of which a pipeline can have more (none: all rows)."""
    status: Status = "trained"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own, without the padding that it has at rest."""
        return self.layout.shape

    @property
    def size(self) -> int:
        """Numbers in it, padding left out."""
        return math.prod(self.shape)

    @property
    def is_stacked(self) -> bool:
        """Whether its rows are layers."""
        return self.axes[:1] == ("layers",)

    @property
    def count(self) -> int:
        """Numbers of the model's in it: also without the empty rows of a pipeline's stages."""
        if self.layers is None or not self.is_stacked:
            return self.size
        return self.size // self.shape[0] * self.layers


def parameter(
    rngs: nnx.Rngs, initializer: Initializer, shape: tuple[int, ...], *, axes: tuple[str, ...], role: Role
) -> nnx.Param:
    """A float32 parameter; `axes` names each dimension, `role` decides decay and precision.

    The layout at rest follows from the names (`Rules.parameter_layout`) and stays with the parameter, as metadata.
    """
    value = initializer(rngs.params(), shape, jnp.float32)
    layout = current().parameter_layout(axes, shape, is_outer=True)
    return nnx.Param(value, spec=ParameterSpec(value.dtype, axes, role, layout))


def buffer(shape: tuple[int, ...], *, axes: tuple[str, ...], value: float = 0.0) -> nnx.Variable:
    """A float32 array of the model, full of `value`, that no gradient changes: a family's program does, once a step.

    `axes` names each dimension, as those of a parameter.
    """
    layout = current().parameter_layout(axes, shape, is_trained=False)
    return nnx.Variable(
        jnp.full(shape, value, jnp.float32),
        spec=ParameterSpec(jnp.dtype(jnp.float32), axes, "bias", layout, status="buffer"),
    )


def of_layers(spec: ParameterSpec, num_layers: int) -> ParameterSpec:
    """Of the same parameter of a layer that one of so many is, in a stack: no two stages have the same of it."""
    layout = current().parameter_layout(spec.axes, spec.shape, is_trained=spec.status == "trained")
    return replace(spec, layout=layout, layers=num_layers)


def frozen(spec: ParameterSpec, dtype: jnp.dtype) -> ParameterSpec:
    """Of the same parameter that no step changes: at rest in the type in which it is used (`working_dtype`).

    It has no optimizer state to share, so what is gathered once a step is whole at rest.
    """
    layout = current().parameter_layout(spec.axes, spec.shape, is_trained=False)
    return replace(spec, dtype=working_dtype(spec.role, dtype), layout=layout, status="frozen")


def parameter_specs(state: PyTree) -> PyTree:
    """Of every parameter of an abstract state, as a plain nested dict; a stack's axis comes first."""
    rules = current()
    layers = rules.axes(*rules.parameters["layers"])

    def stacked(variable: nnx.Variable) -> ParameterSpec:
        spec, shape = variable.get_metadata("spec"), variable.get_value().shape
        rows = shape[: len(shape) - len(spec.shape)]
        axes, layout = ("layers",) * len(rows) + spec.axes, spec.layout.stacked(rows, layers)
        return replace(spec, axes=axes, layout=layout)

    tree = jax.tree.map(stacked, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def fit(value: Array, shape: tuple[int, ...]) -> Array:
    """`value` cut, or padded by zeros, to `shape`: between a parameter's own and that at rest."""
    if value.shape == shape:
        return value
    value = value[tuple(slice(size) for size in shape)]
    return jnp.pad(value, [(0, wanted - size) for wanted, size in zip(shape, value.shape, strict=True)])


def shardings(specs: PyTree) -> PyTree:
    """How every parameter lies at rest on the current mesh."""
    mesh = current().mesh
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec.layout.spec), specs)


def manual_specs(specs: PyTree) -> PyTree:
    """The manual part of how every parameter lies: what the region of the train step is told at its border."""
    manual = current().manual
    return jax.tree.map(lambda spec: only(spec.layout.spec, manual), specs)


def gather_at_use(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """The state of a module with its weights whole over the axes of ZeRO, matrices in `dtype`.

    Called where a module is about to run, so that one layer's weights are whole at a time (ZeRO-3). The backward
    reduce-scatters their gradients in the type of what was gathered.
    """

    def gather(variable: nnx.Variable) -> nnx.Variable:
        value, spec = variable[...], variable.get_metadata("spec")
        has_blocks = spec.layout.blocks is not None and bool(manual_axes())
        layout = spec.layout.stacked(value.shape[: value.ndim - len(spec.shape) - has_blocks])
        return variable.replace(_gather(value, layout, working_dtype(spec.role, dtype)))

    return jax.tree.map(gather, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def working_dtype(role: Role, dtype: jnp.dtype) -> jnp.dtype:
    """The type in which a parameter is used: matrices in the step's, norms and biases in float32."""
    return dtype if role in ("kernel", "embedding", "position", "adapter") else jnp.dtype(jnp.float32)


def gather_once(params: PyTree, specs: PyTree, dtype: jnp.dtype) -> PyTree:
    """Working parameters of a step: local, varying, whole over the axes that only the state is sharded on (ZeRO-1).

    They are cast here, once, and sent as that. Those gathered at use too are float32 again after it, for there
    their gradients are summed in float32; what they hold is what a cast on the way would make of them.
    """

    def gather(value: Array, spec: ParameterSpec) -> Array:
        wanted, gathers = working_dtype(spec.role, dtype), spec.layout.in_blocks(spec.layout.once)
        if spec.layout.at_use and not gathers:
            return vary(_block(value, spec.layout))
        gathered = all_gather(vary(_block(value, spec.layout)), gathers, wanted)
        return gathered.astype(value.dtype) if spec.layout.at_use else gathered

    return jax.tree.map(gather, params, specs)


def reduce_gradients(gradients: PyTree, specs: PyTree) -> PyTree:
    """Gradients summed over the devices, each keeping the part that the state at rest has.

    Axes gathered at use were reduced by their gather's backward; this is the once-a-step part.
    """
    manual, every = current().manual, current().mesh.axis_names

    def reduce(gradient: Array, spec: ParameterSpec) -> Array:
        gradient = reduce_scatter(gradient, spec.layout.in_blocks(spec.layout.once))
        split = {axis for axes in spec_axes(spec.layout.spec) for axis in axes}
        if spec.layout.blocks is not None:
            return _unblock(gradient, spec.layout, tuple(axis for axis in every if axis not in split))
        return all_reduce(gradient, tuple(axis for axis in manual if axis not in split))

    return jax.tree.map(reduce, gradients, specs)


def _block(value: Array, layout: Layout) -> Array:
    """The form of a parameter at rest that a step computes with: see `Layout.blocks`."""
    if (dim := layout.blocks) is None:
        return value
    tensor = current().axes("tensor")
    blocks = PartitionSpec(*(None,) * dim, tensor)
    return over_tensor(lambda part: jnp.expand_dims(vary(part), dim), only(layout.spec, tensor), blocks)(value)


def _unblock(gradient: Array, layout: Layout, axes: Axes) -> Array:
    """The inverse, summed over the axes along which devices have the same part."""
    assert layout.blocks is not None
    dim, tensor = layout.blocks, current().axes("tensor")

    def whole(part: Array) -> Array:
        return jax.lax.psum(jax.lax.squeeze(part, (dim,)), axes)

    return over_tensor(whole, PartitionSpec(*(None,) * dim, tensor), only(layout.spec, tensor))(gradient)


def _gather(value: Array, layout: Layout, dtype: jnp.dtype) -> Array:
    if manual_axes():
        gathers = layout.in_blocks(layout.at_use)
        return all_gather(value, gathers, dtype) if value.dtype != dtype or gathers else value
    # outside the train step the axes are Explicit, and a change of layout is the gather
    return fit(jax.sharding.reshard(value.astype(dtype), layout.used), layout.shape)

"""Parameters: created with logical axes, stored in parts, gathered where they are used."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.roles import Role
from jaxtron.sharding.collectives import Gather, Gathers, all_gather, all_reduce, manual_axes, reduce_scatter, vary
from jaxtron.sharding.config import MANUAL_AXES, SHARD_AXES
from jaxtron.sharding.rules import Layout, current, spec_axes
from jaxtron.typing import Array, PyTree

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], Array]


def parameter(
    rngs: nnx.Rngs, initializer: Initializer, shape: tuple[int, ...], *, axes: tuple[str, ...], role: Role
) -> nnx.Param:
    """A float32 parameter; `axes` names each dimension, `role` decides decay and precision.

    The layout at rest follows from the names (`Rules.parameter_layout`) and stays with the parameter, as metadata.
    """
    value = initializer(rngs.params(), shape, jnp.float32)
    layout = current().parameter_layout(axes, shape)
    return nnx.Param(value, axes=axes, role=role, layout=layout)


def layouts(state: PyTree) -> PyTree:
    """Layout of every parameter of an abstract state, as a plain nested dict; a stack's axis comes first."""
    layers = current().parameters["layers"]

    def layout(variable: nnx.Variable) -> Layout:
        found, shape = variable.get_metadata("layout"), variable.get_value().shape
        if len(shape) == len(found.shape):
            return found
        return Layout(PartitionSpec(layers, *found.spec), shape, (shape[0], *found.padded))

    return _metadata(state, layout)


def fit(value: Array, shape: tuple[int, ...]) -> Array:
    """`value` cut, or padded by zeros, to `shape`: between a parameter's own and that at rest."""
    if value.shape == shape:
        return value
    value = value[tuple(slice(size) for size in shape)]
    return jnp.pad(value, [(0, wanted - size) for wanted, size in zip(shape, value.shape, strict=True)])


def roles(state: PyTree) -> PyTree:
    """Role of every parameter of an abstract state, as a plain nested dict."""
    return _metadata(state, lambda variable: variable.get_metadata("role"))


def logical_axes(state: PyTree) -> PyTree:
    """Logical axes of every parameter of an abstract state; `layers` for stacked ones."""

    def names(variable: nnx.Variable) -> tuple[str, ...]:
        axes = variable.get_metadata("axes")
        return ("layers",) * (variable.get_value().ndim - len(axes)) + tuple(axes)

    return _metadata(state, names)


def shardings(specs: PyTree) -> PyTree:
    """`NamedSharding`s on the current mesh for a tree of specs."""
    mesh = current().mesh
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def manual_specs(specs: PyTree) -> PyTree:
    """The manual part of each spec: what `shard_map` is told at the border of the train step."""
    return jax.tree.map(lambda spec: _only(spec, MANUAL_AXES), specs, is_leaf=_is_spec)


def gather_at_use(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """The state of a module with its weights whole over the axes of ZeRO, matrices in `dtype`.

    Called where a module is about to run, so that one layer's weights are whole at a time (ZeRO-3). The backward
    reduce-scatters their gradients in the type of what was gathered.
    """
    axes = current().gather_at_use

    def gather(variable: nnx.Variable) -> nnx.Variable:
        value = variable[...]
        layout = _stacked(variable.get_metadata("layout"), value.shape)
        return variable.replace(_gather(value, layout, axes, working_dtype(variable.get_metadata("role"), dtype)))

    return jax.tree.map(gather, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def working_dtype(role: Role, dtype: jnp.dtype) -> jnp.dtype:
    """The type in which a parameter is used: matrices in the step's, norms and biases in float32."""
    return dtype if role in ("kernel", "embedding", "position") else jnp.dtype(jnp.float32)


def gather_once(params: PyTree, layouts: PyTree, roles: PyTree, dtype: jnp.dtype) -> PyTree:
    """Working parameters of a step: local, varying, whole over the axes that only the state is sharded on (ZeRO-1).

    They are cast here, once; those gathered at use stay in float32 and are cast on the way, layer by layer.
    """
    rules = current()

    def gather(value: Array, layout: Layout, role: Role) -> Array:
        later = any(rules.size(axes) > 1 for _, axes in _along(layout.spec, rules.gather_at_use))
        wanted = value.dtype if later else working_dtype(role, dtype)
        return all_gather(vary(value), _gathers(layout, rules.gather_once), wanted)

    return jax.tree.map(gather, params, layouts, roles)


def reduce_gradients(gradients: PyTree, layouts: PyTree) -> PyTree:
    """Gradients summed over the devices, each keeping the part that the state at rest has.

    Axes gathered at use were reduced by their gather's backward; this is the once-a-step part.
    """
    rules = current()

    def reduce(gradient: Array, layout: Layout) -> Array:
        sharded = {axis for entry in layout.spec for axis in spec_axes(entry)}
        gradient = reduce_scatter(gradient, _gathers(layout, rules.gather_once))
        whole = tuple(axis for axis in MANUAL_AXES if axis not in sharded)
        return all_reduce(gradient, whole)

    return jax.tree.map(reduce, gradients, layouts)


def _gather(value: Array, layout: Layout, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
    if manual_axes():
        gathers = _gathers(layout, axes)
        return all_gather(value, gathers, dtype) if value.dtype != dtype or gathers else value
    # outside the train step the axes are Explicit, and a change of layout is the gather
    whole = PartitionSpec(*(tuple(a for a in spec_axes(entry) if a not in SHARD_AXES) for entry in layout.spec))
    return fit(jax.sharding.reshard(value.astype(dtype), whole), layout.shape)


def _along(spec: PartitionSpec, axes: tuple[str, ...]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    found = [(dim, tuple(axis for axis in spec_axes(entry) if axis in axes)) for dim, entry in enumerate(spec)]
    return tuple((dim, axes) for dim, axes in found if axes)


def _gathers(layout: Layout, axes: tuple[str, ...]) -> Gathers:
    """Of a parameter over `axes`, after those that are gathered before: padding ends where none are left."""
    rules, gathers = current(), []
    for dim, along in _along(layout.spec, axes):
        sizes = layout.shape[dim], layout.padded[dim]
        is_whole = rules.is_whole(spec_axes(layout.spec[dim]), (*axes, *rules.gather_once))
        gathers.append(Gather(dim, along, sizes if sizes[0] != sizes[1] and is_whole else None))
    return tuple(gathers)


def _only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(tuple(axis for axis in spec_axes(entry) if axis in axes) or None for entry in spec))


def _stacked(layout: Layout, shape: tuple[int, ...]) -> Layout:
    rows = shape[: len(shape) - len(layout.shape)]
    return Layout(PartitionSpec(*(None,) * len(rows), *layout.spec), (*rows, *layout.shape), (*rows, *layout.padded))


def _is_spec(node: object) -> bool:
    return isinstance(node, PartitionSpec)


def _metadata(state: PyTree, read: Callable[[nnx.Variable], object]) -> PyTree:
    tree = jax.tree.map(read, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree

"""A model before it has values: its structure, and what every parameter is and where it lies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.sharding import parameters
from jaxtron.typing import Array, DTypeLike, Key, PyTree

ModuleType = TypeVar("ModuleType", bound=nnx.Module)


@dataclass(frozen=True)
class Blueprint(Generic[ModuleType]):
    """Structure of a module and its parameters as nested dicts: shapes, layouts and specs at rest, roles, logical axes.

    Made by `blueprint` inside `sharding.use(rules)`, and used there.
    """

    build: Callable[[nnx.Rngs], ModuleType]
    graph: nnx.GraphDef
    shapes: PyTree
    layouts: PyTree
    specs: PyTree
    roles: PyTree
    axes: PyTree
    layers: int | None = None
    """Layers among the rows of stacked parameters, of which a pipeline can have more (none: all rows)."""

    @property
    def abstract(self) -> PyTree:
        """Shapes, types and shardings of the parameters at rest, for compilation and restoring."""
        return jax.tree.map(
            lambda leaf, layout, sharding: jax.ShapeDtypeStruct(layout.padded, leaf.dtype, sharding=sharding),
            self.shapes,
            self.layouts,
            parameters.shardings(self.specs),
        )

    @property
    def num_parameters(self) -> int:
        """Parameters, the vocabulary's padding included and empty rows of a pipeline's stages left out."""
        axes = jax.tree.leaves(self.axes, is_leaf=lambda node: isinstance(node, tuple))
        return sum(map(self.count, jax.tree.leaves(self.shapes), axes))

    def count(self, leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> int:
        """Parameters in an array with these logical axes, without empty rows."""
        is_stacked = self.layers is not None and axes[:1] == ("layers",)
        return leaf.size // leaf.shape[0] * self.layers if is_stacked else leaf.size

    def initialize(self, key: Key[Array, ""]) -> PyTree:
        """Initial parameters, each device making its own part; their values do not depend on the mesh."""

        def values(key: Array) -> PyTree:
            return self.at_rest(nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1]))

        return jax.jit(jax.sharding.auto_axes(values, out_sharding=self.specs))(key)

    def at_rest(self, params: PyTree) -> PyTree:
        """Values in the parameters' own shapes, with the padding that they have at rest."""
        return jax.tree.map(lambda value, layout: parameters.fit(value, layout.padded), params, self.layouts)

    def module(self, params: PyTree) -> ModuleType:
        """The module with these parameter values."""
        return nnx.merge(self.graph, params)

    def working(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        """Parameters of a step, inside its manual region; see `parameters.gather_once`."""
        return parameters.gather_once(params, self.layouts, self.roles, jnp.dtype(dtype))


def blueprint(build: Callable[[nnx.Rngs], ModuleType], *, layers: int | None = None) -> Blueprint[ModuleType]:
    """The blueprint of what `build` makes, without making it; `layers` where stacked parameters have empty rows."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    layouts = parameters.layouts(state)
    return Blueprint(
        build=build,
        graph=graph,
        shapes=nnx.to_pure_dict(state),
        layouts=layouts,
        specs=jax.tree.map(lambda layout: layout.spec, layouts),
        roles=parameters.roles(state),
        axes=parameters.logical_axes(state),
        layers=layers,
    )

"""A model before it has values: its structure, and what every parameter is and where it lies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.sharding.parameters import fit, gather_once, parameter_specs, shardings
from jaxtron.typing import Array, DTypeLike, Key, PyTree

ModuleType = TypeVar("ModuleType", bound=nnx.Module)


@dataclass(frozen=True)
class Blueprint(Generic[ModuleType]):
    """Structure of a module, and what its parameters are, as nested dicts of `ParameterSpec`.

    Made by `blueprint` inside `sharding.use(rules)`, and used there.
    """

    build: Callable[[nnx.Rngs], ModuleType]
    graph: nnx.GraphDef
    parameters: PyTree

    @property
    def abstract(self) -> PyTree:
        """Shapes, types and shardings of the parameters at rest, for compilation and restoring."""
        return jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(spec.layout.padded, spec.dtype, sharding=sharding),
            self.parameters,
            shardings(self.parameters),
        )

    @property
    def roles(self) -> PyTree:
        """What every parameter is, for the optimizer."""
        return jax.tree.map(lambda spec: spec.role, self.parameters)

    @property
    def num_parameters(self) -> int:
        """Parameters, the vocabulary's padding included and empty rows of a pipeline's stages left out."""
        return sum(spec.count for spec in jax.tree.leaves(self.parameters))

    def initialize(self, key: Key[Array, ""]) -> PyTree:
        """Initial parameters, each device making its own part; their values do not depend on the mesh."""

        def values(key: Array) -> PyTree:
            return self.at_rest(nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1]))

        specs = jax.tree.map(lambda spec: spec.layout.spec, self.parameters)
        return jax.jit(jax.sharding.auto_axes(values, out_sharding=specs))(key)

    def at_rest(self, params: PyTree) -> PyTree:
        """Values in the parameters' own shapes, with the padding that they have at rest."""
        return jax.tree.map(lambda value, spec: fit(value, spec.layout.padded), params, self.parameters)

    def module(self, params: PyTree) -> ModuleType:
        """The module with these parameter values."""
        return nnx.merge(self.graph, params)

    def working(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        """Parameters of a step, inside its manual region; see `parameters.gather_once`."""
        return gather_once(params, self.parameters, jnp.dtype(dtype))


def blueprint(build: Callable[[nnx.Rngs], ModuleType]) -> Blueprint[ModuleType]:
    """The blueprint of what `build` makes, without making it."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return Blueprint(build, graph, parameter_specs(state))

"""A model before it has values: its structure, and what every parameter is and where it lies."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.roles import Status
from jaxtron.sharding.parameters import ParameterSpec, fit, frozen, gather_once, parameter_specs, shardings
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
        """What every parameter is that is trained, for the optimizer."""
        return jax.tree.map(lambda spec: spec.role, self.trained)

    @property
    def trained(self) -> PyTree:
        """The `parameters` that are trained, None in the place of others."""
        return self.of("trained", self.parameters)

    @property
    def names(self) -> dict[str, ParameterSpec]:
        """All parameters by their names: the way to them, with dots."""
        return {
            ".".join(str(getattr(key, "key", key)) for key in path): spec
            for path, spec in jax.tree.leaves_with_path(self.parameters)
        }

    @property
    def parameter_names(self) -> list[str]:
        """Those of `names` that are no buffers."""
        return [name for name, spec in self.names.items() if spec.status != "buffer"]

    @property
    def buffer_names(self) -> list[str]:
        """Those of `names` that are."""
        return [name for name, spec in self.names.items() if spec.status == "buffer"]

    def freeze(self, names: Collection[str], dtype: DTypeLike) -> "Blueprint[ModuleType]":
        """The same with the parameters of these names frozen, at rest as a step uses them that computes in `dtype`."""
        if not names:
            return self
        state = nnx.split(self.module(self.abstract))[1]

        def convert(path: tuple[str | int, ...], variable: nnx.Variable) -> nnx.Variable:
            if ".".join(map(str, path)) not in names:
                return variable
            return variable.replace(spec=frozen(variable.get_metadata("spec"), jnp.dtype(dtype)))

        state = nnx.map_state(convert, state)
        graph = nnx.split(nnx.merge(self.graph, state))[0]
        return replace(self, graph=graph, parameters=parameter_specs(state))

    def of(self, status: Status, tree: PyTree) -> PyTree:
        """A tree that is like the parameters with None where they have another status."""
        return jax.tree.map(lambda spec, leaf: leaf if spec.status == status else None, self.parameters, tree)

    @property
    def num_parameters(self) -> int:
        """Parameters, the vocabulary's padding included; empty rows of a pipeline's stages and buffers left out."""
        return sum(spec.count for spec in jax.tree.leaves(self.parameters) if spec.status != "buffer")

    @property
    def num_trained(self) -> int:
        """Those of them that are trained."""
        return sum(spec.count for spec in jax.tree.leaves(self.parameters) if spec.status == "trained")

    def initialize(self, key: Key[Array, ""]) -> PyTree:
        """Initial parameters, each device making its own part; their values do not depend on the mesh."""

        def values(key: Array) -> PyTree:
            return self.at_rest(nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1]))

        specs = jax.tree.map(lambda spec: spec.layout.spec, self.parameters)
        return jax.jit(jax.sharding.auto_axes(values, out_sharding=specs))(key)

    def at_rest(self, params: PyTree) -> PyTree:
        """Values in the parameters' own shapes, in the types and with the padding that they have at rest."""
        return jax.tree.map(
            lambda value, spec: fit(value.astype(spec.dtype), spec.layout.padded), params, self.parameters
        )

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

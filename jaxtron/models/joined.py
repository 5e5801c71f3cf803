"""Weights that a module multiplies by as one: joined once a step, not by every layer in every microbatch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.models.program import Parts
from jaxtron.sharding.parameters import ParameterSpec, parameter_specs, working_dtype
from jaxtron.typing import DTypeLike, PyTree

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


@runtime_checkable
class JoinsWeights(Protocol):
    """A module that multiplies by several of its weights as one."""

    @property
    def has_joined(self) -> bool:
        """Whether they are one array, of each kind."""
        ...

    def weights_to_join(self) -> tuple[ParameterSpec, ...]:
        """What is known of them; empty where they are not multiplied as one."""
        ...

    def join_weights(self) -> None:
        """Puts what is joined in their place; they may be stacked, with layers in front."""
        ...

    def part_weights(self) -> None:
        """The inverse, of weights or what is like them."""
        ...


@dataclass(frozen=True)
class JoinedParts(Parts[ModuleT]):
    """Parts of a model whose modules have weights joined."""

    apart: Parts[ModuleT]
    """The same, as weights are at rest."""

    def join_weights(self, params: PyTree) -> PyTree:
        """A step's parameters as these parts have them."""
        module = self.apart.blueprint.module(params)
        for one, joined in zip(_joining(module), _joining(self.abstract), strict=True):
            if joined.has_joined:
                one.join_weights()
        return _values(module)

    def part_weights(self, gradients: PyTree) -> PyTree:
        """The inverse of `join_weights`, of what is like parameters; where there is None, there is None."""
        module = self.blueprint.module(gradients)
        for one in _joining(module):
            if one.has_joined:
                one.part_weights()
        return _values(module)


def joined_parts(parts: Parts[ModuleT], dtype: DTypeLike) -> JoinedParts[ModuleT]:
    """Those of a step in `dtype`, inside `sharding.use(rules)`.

    Only what is copied for the step anyway is joined, so that it takes no more memory: not what is used as it lies, and
    not what layers gather.
    """

    def is_copied(spec: ParameterSpec) -> bool:
        return spec.layout.once != () or working_dtype(spec.role, jnp.dtype(dtype)) != spec.dtype

    def can_join(one: JoinsWeights) -> bool:
        specs = one.weights_to_join()
        kernels = [spec for spec in specs if spec.role == "kernel"]
        own = all(spec.status == "trained" and not spec.layout.at_use for spec in specs)
        return bool(kernels) and own and all(map(is_copied, kernels))

    def build(params: PyTree) -> ModuleT:
        module = parts.blueprint.module(params)
        for one in _joining(module):
            if can_join(one):
                one.join_weights()
        return module

    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), parts.blueprint.parameters)
    graph, state = nnx.split(nnx.eval_shape(build, shapes))
    return JoinedParts(replace(parts.blueprint, graph=graph, parameters=parameter_specs(state)), parts.stacks, parts)


def _joining(module: nnx.Module) -> Iterator[JoinsWeights]:
    return (one for _, one in nnx.iter_modules(module) if isinstance(one, JoinsWeights))


def _values(module: nnx.Module) -> PyTree:
    return nnx.to_pure_dict(nnx.split(module)[1])

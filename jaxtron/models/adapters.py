"""Low-rank adapters of a model's linear layers (LoRA): which have them, and a model with and without."""

import functools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from jaxtron.config import UserError, shown
from jaxtron.layers.config import LoraConfig
from jaxtron.layers.linear import Adapter, Linear
from jaxtron.models.stacked import stacked
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.parameters import fit, parameter_specs
from jaxtron.typing import PyTree

# the attribute of a linear layer, and so the way to its parameters
LORA = "lora"
MOST_NAMED = 12


def add_adapters(module: nnx.Module, config: LoraConfig, partitions: Mapping[str, Partition], rngs: nnx.Rngs) -> None:
    """Gives the module's linear layers new adapters, those that `config.targets` name; `partitions` has the layers in
    the slots of each stack, by path.

    A `UserError` for a pattern that names none.
    """
    layers = dict(_linear_layers(module))
    for pattern in config.targets:
        if not any(is_target(name, (pattern,)) for name in layers):
            names = dict.fromkeys(".".join(name.rsplit(".", 2)[-2:]) for name in layers)
            here = f"they are {', '.join(list(names)[:MOST_NAMED])}" if names else "it has none that can have one"
            raise UserError(f"train.lora.targets {shown(pattern)} names no linear layer of the model; {here}")
    for name, layer in layers.items():
        if is_target(name, config.targets):
            partition = _partition_of(name, partitions)
            make = functools.partial(layer.adapter, config, _site(name))
            layer.lora = make(rngs) if partition is None else stacked(make, partition, rngs)


def merge_adapters(blueprint: Blueprint[Any], params: PyTree) -> PyTree:
    """Parameters of the model without adapters that computes the same, as `without_adapters` has them at rest: each
    matrix with its adapter's product, added in float32."""
    base = without_adapters(blueprint)

    def run(params: PyTree) -> PyTree:
        module = blueprint.module(
            jax.tree.map(lambda value, spec: fit(value, spec.shape), params, blueprint.parameters)
        )
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, Linear) and layer.lora is not None:
                layer.kernel, layer.lora = nnx.Param(layer.merged()), nnx.data(None)
        return base.at_rest(nnx.to_pure_dict(nnx.split(module)[1]))

    specs = jax.tree.map(lambda spec: spec.layout.spec, base.parameters)
    return jax.jit(jax.sharding.auto_axes(run, out_sharding=specs))(params)


def is_target(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a linear layer's name, or the end of it, matches one of the patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def without_adapters(blueprint: Blueprint[Any]) -> Blueprint[Any]:
    """The blueprint of the same model that has none, which the weights of a base model are for."""
    if not any(spec.role == "adapter" for spec in jax.tree.leaves(blueprint.parameters)):
        return blueprint
    module = blueprint.module(blueprint.abstract)
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Linear):
            layer.lora = nnx.data(None)
    graph, state = nnx.split(module)
    return replace(blueprint, graph=graph, parameters=parameter_specs(state))


def with_adapters(params: PyTree, like: PyTree) -> PyTree:
    """Parameters of a model without adapters, with those of `like`, a tree of one that has them."""
    if not isinstance(like, dict):
        return params
    return {
        name: part if name not in params and name == LORA else with_adapters(params[name], part)
        for name, part in like.items()
    }


def drops(module: nnx.Module) -> bool:
    """Whether a step of the module draws what its adapters drop."""
    return any(isinstance(layer, Adapter) and layer.dropout > 0 for _, layer in nnx.iter_modules(module))


def _site(name: str) -> int:
    """A number for an adapter that others of its branch have not: of the name of its layer there, the same on every
    mesh."""
    return zlib.crc32(name.rpartition(".")[2].encode()) >> 1


def _linear_layers(module: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Those that can have an adapter, by name: what joins their weights to one product does not know of any."""
    modules = {tuple(map(str, path)): node for path, node in nnx.iter_modules(module)}
    for path, node in modules.items():
        if isinstance(node, Linear) and path[-1] not in getattr(modules[path[:-1]], "JOINED", ()):
            yield ".".join(path), node


def _partition_of(name: str, partitions: Mapping[str, Partition]) -> Partition | None:
    """The layers that a stacked layer's rows are of; None outside of stacks."""
    for path, partition in partitions.items():
        own = {f"{path}/{kind}": part for kind, part in partition.by_kind.items()} or {path: partition}
        for place, part in own.items():
            if name.startswith(f"{place.replace('/', '.')}."):
                return part
    return None

"""All arrays of a model by what they are, from its blueprint: which of them a configuration trains, and adapters."""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxtron.layers.config import LoraConfig
from jaxtron.models.families import family_of
from jaxtron.models.family import FamilyConfig
from jaxtron.models.program import make_parts
from jaxtron.roles import Role, Status
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.run.trainable import flops_per_token, freeze
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.layout import spec_axes
from jaxtron.sharding.mesh import abstract_mesh, build_mesh
from jaxtron.sharding.rules import Rules, make_rules, use
from jaxtron.typing import PyTree


@dataclass(frozen=True)
class Parameter:
    """An array of the model's, whole; one of a stack or kind, by number, has a row's shape without the leading axis."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role
    stack: int | None
    status: Status

    def part(self, rules: Rules) -> tuple[int, ...]:
        """A device's part of it where it is used: split by tensor (and of experts by what splits those) alone."""
        used = spec_axes(rules.parameter_layout(self.axes, self.shape).used)
        return tuple(size // rules.size(axes) for size, axes in zip(self.shape, used, strict=True))


class Traced(NamedTuple):
    """All of them, and the FLOPs of a token's forward and backward of what is trained."""

    parameters: tuple[Parameter, ...]
    flops_per_token: float


def parameters_of(config: Configuration) -> tuple[Parameter, ...]:
    """All arrays of the model of a configuration."""
    return traced(config).parameters


def traced(config: Configuration) -> Traced:
    """What is known of them by tracing the model on one device; once for all layouts of it."""
    train = config.train
    # settings are frozen, and so hashed
    adapted: Any = (config.model, train.lora)
    return _traced(*adapted, train.trainable, train.precision, config.data.sequence_length)


@functools.lru_cache(maxsize=16)
def _traced(
    model: FamilyConfig, lora: LoraConfig | None, trainable: tuple[str, ...], precision: str, length: int
) -> Traced:
    family = family_of(model)
    with use(make_rules(build_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingConfig())):
        dtype = DTYPES[precision]
        parts = make_parts(model, dtype, lora=lora)
        blueprint = freeze(parts.blueprint, trainable, dtype)
        flops = flops_per_token(family, model, length, blueprint)
    split, kinds = parts.split(blueprint.parameters), family.kinds(model)
    alike: list[PyTree] = []
    for number, specs in enumerate(split.stacks):
        own = kinds[number] if kinds else ()
        alike += [specs[kind] for kind in dict.fromkeys(own)] or [specs]
    owners = ((None, split.outer), *enumerate(alike))
    found = (
        Parameter(
            ".".join(str(getattr(key, "key", key)) for key in path),
            spec.axes[spec.is_stacked :],
            spec.shape[spec.is_stacked :],
            spec.role,
            stack,
            spec.status,
        )
        for stack, specs in owners
        for path, spec in jax.tree.leaves_with_path(specs)
    )
    return Traced(tuple(found), flops)


def abstract_rules(mesh: MeshConfig, config: ShardingConfig) -> Rules:
    """Of a mesh without devices, no axis open: rules read nothing but its sizes."""
    return make_rules(abstract_mesh(mesh, math.prod(getattr(mesh, flag) for flag in FLAGS)), config)

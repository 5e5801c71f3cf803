"""Where everything lies: the mesh, the two tables of logical axes, and what moves between layouts."""

from jaxtron.sharding.blueprint import Blueprint, blueprint
from jaxtron.sharding.collectives import manual_axes, vary
from jaxtron.sharding.context import ContextConfig
from jaxtron.sharding.mesh import AXES, BATCH_AXES, MANUAL_AXES, SHARD_AXES, MeshConfig, build_mesh
from jaxtron.sharding.parameters import gather_at_use, parameter
from jaxtron.sharding.rules import Rules, ShardingConfig, constrain, current, make_rules, spec, use

__all__ = [
    "AXES",
    "BATCH_AXES",
    "Blueprint",
    "ContextConfig",
    "MANUAL_AXES",
    "MeshConfig",
    "Rules",
    "SHARD_AXES",
    "ShardingConfig",
    "blueprint",
    "build_mesh",
    "constrain",
    "current",
    "gather_at_use",
    "make_rules",
    "manual_axes",
    "parameter",
    "spec",
    "use",
    "vary",
]

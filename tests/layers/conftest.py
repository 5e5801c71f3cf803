"""Rules on a mesh of the simulated devices, and the region in which layers run."""

import math
from collections.abc import Callable

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxtron.sharding import MANUAL_AXES, MeshConfig, Rules, ShardingConfig, build_mesh, make_rules, vary
from jaxtron.sharding.collectives import all_reduce


@pytest.fixture
def rules_for() -> Callable[..., Rules]:
    """`rules_for(data=2, tensor=4)` are the rules on the first eight devices; `zero=` is the ZeRO level."""

    def rules(zero: str = "optimizer", **mesh: int) -> Rules:
        devices = jax.devices()[: math.prod(mesh.values())]
        return make_rules(build_mesh(MeshConfig(**{"data": 1, **mesh}), devices), ShardingConfig(zero=zero))

    return rules


@pytest.fixture
def in_region() -> Callable:
    """`in_region(function)` runs on arrays split over tensor, with manual batch axes as in the train step."""

    def wrap(function: Callable) -> Callable:
        def region(*arrays):
            outputs = function(*(vary(array) for array in arrays))
            return jax.tree.map(lambda array: all_reduce(vary(array), MANUAL_AXES), outputs)

        whole = PartitionSpec()
        return jax.jit(jax.shard_map(region, in_specs=whole, out_specs=whole, axis_names=set(MANUAL_AXES)))

    return wrap

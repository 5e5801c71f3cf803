"""Rules on a mesh of the simulated devices."""

import math
from collections.abc import Callable

import jax
import pytest

from jaxtron.sharding import MeshConfig, Rules, ShardingConfig, build_mesh, make_rules


@pytest.fixture
def rules_for() -> Callable[..., Rules]:
    """`rules_for(data=2, tensor=4)` are the rules on the first eight devices; `zero=` is the ZeRO level."""

    def rules(zero: str = "optimizer", **mesh: int) -> Rules:
        devices = jax.devices()[: math.prod(mesh.values())]
        return make_rules(build_mesh(MeshConfig(**{"data": 1, **mesh}), devices), ShardingConfig(zero=zero))

    return rules

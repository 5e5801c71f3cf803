"""The region in which layers run."""

from collections.abc import Callable

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.config import MANUAL_AXES


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

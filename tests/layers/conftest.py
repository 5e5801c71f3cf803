"""The region in which layers run."""

from collections.abc import Callable

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current


@pytest.fixture
def in_region() -> Callable:
    """`in_region(function)` runs on arrays split over tensor, with manual batch axes as in the train step."""

    def wrap(function: Callable) -> Callable:
        def local(*arrays):
            outputs = function(*(vary(array) for array in arrays))
            return jax.tree.map(lambda array: all_reduce(vary(array), current().manual), outputs)

        whole = PartitionSpec()
        return jax.jit(region(local, whole, whole))

    return wrap

"""Eight simulated CPU devices for every test, and Jaxtron's annotations checked in it (`support/checking.py`)."""

import gc
from collections.abc import Callable

import pytest

from tests.support import checking, compiling

pytest_plugins = ["pytester", "tests.support.durations", "tests.support.emitters", "tests.support.quarters"]

# until all is imported, which leaves none
gc.disable()
# before anything imports jaxtron
checking.install()

compiling.eight_devices()


def pytest_collection_finish() -> None:
    """What is imported by now stays, and a tenth of the time went into looking through it for garbage."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def count_calls_anew() -> None:
    """What is checked of many calls does not depend on the tests before."""
    checking.start_test()


@pytest.fixture
def rules_for() -> Callable:
    """`rules_for(data=2, tensor=4)` are the rules on the first eight devices; `zero=` is the ZeRO level."""
    # here and not above: JAX starts only once the environment is set, and typed imports once their hook is
    from tests.support import equivalence

    return lambda zero="optimizer", **mesh: equivalence.rules_for(mesh, zero)


@pytest.fixture
def in_region() -> Callable:
    """`in_region(function)` runs on arrays split over tensor, with manual batch axes as in the train step."""
    import jax
    from jax.sharding import PartitionSpec

    from jaxtron.sharding.collectives import all_reduce, vary
    from jaxtron.sharding.regions import region
    from jaxtron.sharding.rules import current

    def wrap(function: Callable) -> Callable:
        def local(*arrays):
            outputs = function(*jax.tree.map(vary, arrays))
            return jax.tree.map(lambda array: all_reduce(vary(array), current().manual), outputs)

        whole = PartitionSpec()
        return jax.jit(region(local, whole, whole))

    return wrap


def pytest_addoption(parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew from today's code")

"""Whether every number of a state is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.checkpoint.finite import first_not_finite
from jaxtron.sharding.rules import use


def state(rules, bad: float, place: tuple[int, int]):
    """Two matrices, split and copied, a scalar and counts; one number of the split matrix is `bad`."""
    values = np.ones((8, 16), np.float32)
    values[place] = bad
    split, copied = (NamedSharding(rules.mesh, PartitionSpec(*axes)) for axes in (("data", "tensor"), ()))
    return {
        "step": jnp.int32(7),
        "params": {"a": jax.device_put(jnp.ones((4, 4), jnp.bfloat16), copied), "b": jax.device_put(values, split)},
        "scale": jnp.float32(2.0**40),
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_of_one_device_is_enough(rules_for, bad: float):
    rules = rules_for(data=2, tensor=4)
    with use(rules), jax.set_mesh(rules.mesh):
        assert first_not_finite(state(rules, 3.4e38, (7, 15))) is None
        assert first_not_finite(state(rules, bad, (7, 15))) == "params.b"
        assert first_not_finite({"loss_scale": jnp.float32(bad), "params": jnp.float32(bad)}) == "loss_scale"


def test_counts_are_finite():
    assert first_not_finite({"step": jnp.int32(2**31 - 1)}) is None
    assert first_not_finite({}) is None

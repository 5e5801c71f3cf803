"""Dropout: its expectation, and masks that belong to a row of the global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.layers.inputs import LayerInputs, dropout, row_keys
from jaxtron.sharding.rules import use

AXES = ("batch", "seq", "embed")


def masks(rows, rate, number=None, seed=0, shape=(16, 8)):
    """What dropout makes of ones."""
    inputs = LayerInputs(keys=row_keys(jax.random.key(seed), np.asarray(rows)))
    if number is not None:
        inputs = inputs.fold(number)
    return np.asarray(dropout(jnp.ones((len(rows), *shape)), rate, inputs, *AXES))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_kept_entries_are_scaled_to_keep_the_expectation(rules_for, rate):
    with use(rules_for(data=1)):
        y = masks(range(64), rate, shape=(32, 16))
    # masks are drawn from 16 bits, and the scale is that of the rate as drawn
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-3)
    assert (y == 0).mean() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / y.size) ** 0.5)
    assert y.mean() == pytest.approx(1, abs=0.05)


def test_masks_do_not_depend_on_how_the_batch_is_cut(rules_for):
    with use(rules_for(data=1)):
        whole = masks(range(8), 0.3)
        np.testing.assert_array_equal(masks([2, 3], 0.3), whole[2:4])
        assert len({row.tobytes() for row in whole}) == 8


def test_masks_do_not_depend_on_the_mesh(rules_for):
    with use(rules_for(data=1)):
        expected = masks(range(4), 0.3)
    with use(rules_for(data=2, tensor=4)) as rules:
        sharding = NamedSharding(rules.mesh, PartitionSpec(("data", "fsdp"), "tensor"))
        x = jax.device_put(jnp.ones((4, 16, 8)), sharding)
        rows = jax.device_put(jnp.arange(4), NamedSharding(rules.mesh, PartitionSpec(("data", "fsdp"))))

        def run(x, rows):
            return dropout(x, 0.3, LayerInputs(keys=row_keys(jax.random.key(0), rows)), *AXES)

        y = jax.jit(run)(x, rows)
        assert y.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(y, expected)


def test_every_layer_site_and_step_has_masks_of_its_own(rules_for):
    with use(rules_for(data=1)):
        drawn = [masks([0], 0.5), masks([0], 0.5, 0), masks([0], 0.5, 1), masks([0], 0.5, seed=1)]
        np.testing.assert_array_equal(masks([0], 0.5, 1), drawn[2])
    assert len({mask.tobytes() for mask in drawn}) == 4


def test_no_keys_or_no_rate_is_the_identity(rules_for):
    x = jnp.ones((2, 4, 4))
    with use(rules_for(data=1)):
        assert dropout(x, 0.5, LayerInputs(), *AXES) is x
        assert dropout(x, 0.0, LayerInputs(keys=row_keys(jax.random.key(0), np.arange(2))), *AXES) is x
        assert LayerInputs().fold(3) == LayerInputs()


def test_type_is_kept(rules_for):
    with use(rules_for(data=1)):
        inputs = LayerInputs(keys=row_keys(jax.random.key(0), np.arange(2)))
        assert dropout(jnp.ones((2, 4, 4), jnp.bfloat16), 0.5, inputs, *AXES).dtype == jnp.bfloat16


def test_gradients_pass_where_values_do(rules_for):
    with use(rules_for(data=1)):
        inputs = LayerInputs(keys=row_keys(jax.random.key(0), np.arange(2)))
        x = jnp.ones((2, 4, 4))
        gradient = jax.grad(lambda x: jnp.sum(3 * dropout(x, 0.5, inputs, *AXES)))(x)
        np.testing.assert_array_equal(gradient, 3 * dropout(x, 0.5, inputs, *AXES))

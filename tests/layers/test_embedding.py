"""Look-up in a table that is split over its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.layers.embedding import Embedding, look_up
from jaxtron.sharding.rules import use

VOCAB, EMBED, ROWS, LENGTH = 12, 6, 3, 8


def place(rules, array, *spec):
    return jax.device_put(array, NamedSharding(rules.mesh, PartitionSpec(*spec)))


def look_up_and_pull(table, tokens, cotangent):
    """Rows, and the gradient of the table."""
    x, pull = jax.vjp(lambda table: look_up(table, tokens), table)
    return x, pull(cotangent)[0]


@pytest.mark.parametrize("tensor", [1, 4])
def test_rows_and_their_gradient(rules_for, in_region, tensor):
    generator = np.random.default_rng(0)
    table, cotangent = generator.normal(size=(VOCAB, EMBED)), generator.normal(size=(ROWS, LENGTH, EMBED))
    table, cotangent = table.astype(np.float32), cotangent.astype(np.float32)
    # tokens repeat, and the last ones of the table never occur
    tokens = generator.integers(0, VOCAB - 2, (ROWS, LENGTH))
    with use(rules_for(tensor=tensor)) as rules:
        placed = place(rules, table, "tensor"), tokens, place(rules, cotangent, None, "tensor")
        x, gradient = in_region(look_up_and_pull)(*placed)
    assert x.sharding.spec[1] == "tensor" and gradient.sharding.spec[0] == "tensor"
    np.testing.assert_array_equal(x, table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, cotangent)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tensor", [1, 4])
def test_gradient_of_a_frequent_token_is_summed_in_float32(rules_for, in_region, tensor):
    # in bfloat16 a sum of ones stops at 256
    count = 1024
    with use(rules_for(tensor=tensor)) as rules:
        table = place(rules, jnp.zeros((VOCAB, EMBED), jnp.bfloat16), "tensor")
        cotangent = place(rules, jnp.ones((1, count, EMBED), jnp.bfloat16), None, "tensor")
        _, gradient = in_region(look_up_and_pull)(table, np.full((1, count), 5), cotangent)
    assert gradient.dtype == jnp.bfloat16
    assert np.all(np.asarray(gradient, np.float32)[5] == count)


def test_learned_positions_are_added(rules_for):
    tokens = np.array([[3, 1, 4], [1, 5, 9]])
    with use(rules_for(data=1)):
        module = Embedding(VOCAB, EMBED, num_positions=5, std=1.0, rngs=nnx.Rngs(0))
        x = module(tokens)
        table, positions = np.asarray(module.table[...]), np.asarray(module.positions[...])
    np.testing.assert_allclose(x, table[tokens] + positions[:3], rtol=1e-6)


def test_no_positions_unless_asked_for(rules_for):
    with use(rules_for(data=1)):
        module = Embedding(VOCAB, EMBED, num_positions=None, std=1.0, rngs=nnx.Rngs(0))
        assert module.positions is None
        tokens = np.array([[3, 1, 4]])
        np.testing.assert_array_equal(module(tokens), np.asarray(module.table[...])[tokens])

"""Collectives over the manual axes, beside an Explicit tensor axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtron.sharding.collectives import all_gather, all_reduce, largest, manual_axes, reduce_scatter, vary
from jaxtron.sharding.layout import Gather
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import use

BATCH = ("data", "fsdp")
MANUAL = ("pipe", "data", "fsdp", "context")
# rows over all manual axes, most of them of one part
ROWS = P(MANUAL)


def in_region(function, in_specs, out_specs):
    return jax.jit(region(function, in_specs, out_specs))


@pytest.fixture
def cube(rules_for):
    with use(rules_for(data=2, fsdp=2, tensor=2)) as rules:
        yield rules


def test_manual_axes_only_inside(cube):
    assert manual_axes() == frozenset()
    inside = []
    in_region(lambda x: (inside.append(manual_axes()), x)[1], P(BATCH), P(BATCH))(jnp.ones(4))
    assert inside[0] == set(MANUAL) == set(cube.manual)


def test_gather_then_scatter_is_a_sum_of_copies(cube):
    x = jax.device_put(
        np.arange(64.0, dtype=np.float32).reshape(8, 8), jax.NamedSharding(cube.mesh, P(BATCH, "tensor"))
    )

    def round_trip(x):
        whole = all_gather(vary(x), (Gather(0, BATCH),), jnp.dtype(jnp.float32))
        assert whole.shape == (8, 8)
        return reduce_scatter(whole, (Gather(0, BATCH),))

    y = in_region(round_trip, ROWS, ROWS)(x)
    assert y.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_array_equal(y, 4 * np.asarray(x))


def test_gather_along_two_dimensions(cube):
    x = np.arange(32.0, dtype=np.float32).reshape(4, 8)

    def gather(x):
        whole = all_gather(vary(x), (Gather(0, ("data",)), Gather(1, ("fsdp",))), jnp.dtype(jnp.float32))
        return all_reduce(whole, MANUAL)

    np.testing.assert_array_equal(in_region(gather, P("data", "fsdp"), P())(x), 4 * x)


@pytest.mark.parametrize("mesh", [{"data": 3, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_a_gather_leaves_out_padding_and_a_scatter_puts_it_back(rules_for, mesh):
    # five over eight parts: the last three have padding alone
    parts = mesh["data"] * mesh.get("fsdp", 1)
    padded = -(-5 // parts) * parts
    with use(rules_for(**mesh)) as rules:
        values = np.zeros((2, padded), np.float32)
        values[:, :5] = np.arange(1, 11).reshape(2, 5)
        x = jax.device_put(values, jax.NamedSharding(rules.mesh, P("tensor", BATCH)))

        def run(x):
            whole, pull = jax.vjp(
                lambda x: all_gather(x, (Gather(1, BATCH, (5, padded)),), jnp.dtype(jnp.float32)), vary(x)
            )
            assert whole.shape == (2, 5)
            return pull(whole)[0]

        found = in_region(run, P(None, MANUAL), P(None, MANUAL))(x)
    np.testing.assert_array_equal(found, parts * values)


def test_gather_sends_the_type_asked_for_and_sums_gradients_in_that_of_the_shard(cube):
    # 1 + 2^-9 is not in bfloat16; the sum of four such cotangents in float32 is exact
    x = np.full(4, 1 + 2.0**-9, np.float32)

    def run(x):
        whole, pull = jax.vjp(lambda x: all_gather(x, (Gather(0, BATCH),), jnp.dtype(jnp.bfloat16)), vary(x))
        assert whole.dtype == jnp.bfloat16
        (gradient,) = pull(jnp.full_like(whole, 1 + 2.0**-7) + vary(jnp.bfloat16(0)))
        assert gradient.dtype == jnp.float32
        return all_reduce(whole.astype(jnp.float32), MANUAL) / 4, gradient

    whole, gradient = in_region(run, ROWS, (P(), ROWS))(x)
    np.testing.assert_array_equal(whole, 1)
    np.testing.assert_array_equal(gradient, 4 * (1 + 2.0**-7))


def test_sums_and_maxima(cube):
    x = np.array([3.0, 1.0, 4.0, 2.0], np.float32)
    run = in_region(lambda x: (all_reduce(x, BATCH), largest(x, BATCH)), P(BATCH), (P(), P()))
    total, top = run(x)
    np.testing.assert_array_equal(total, [10])
    np.testing.assert_array_equal(top, [4])


def test_vary_is_the_identity_and_repeatable(cube):
    y = in_region(lambda x: all_reduce(vary(vary(x)), MANUAL), P(), P())(np.ones(3, np.float32))
    np.testing.assert_array_equal(y, 4)
    x = jnp.ones(3)
    assert vary(x) is x

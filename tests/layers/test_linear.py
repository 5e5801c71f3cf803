"""Products over several named dimensions."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.layers.linear import Linear, project
from jaxtron.sharding.parameters import parameter_specs
from jaxtron.sharding.rules import use


@pytest.mark.parametrize("bias", [True, False])
def test_named_dimensions_are_contracted_and_made(rules_for, bias):
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    with use(rules_for(data=1)):
        layer = Linear({"heads": 4, "head_dim": 3}, {"embed": 6}, bias=bias, std=1.0, rngs=nnx.Rngs(0))
        if bias:
            layer.bias[...] = layer.bias[...] + np.arange(6)
        y = layer(x, "batch", "seq", "embed")
    expected = np.einsum("bshd,hde->bse", x, np.asarray(layer.kernel[...])) + (np.arange(6) if bias else 0)
    assert layer.kernel[...].shape == (4, 3, 6)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_parameters_know_their_role_and_layout(rules_for):
    with use(rules_for(data=2, fsdp=2, tensor=2, zero="none")):
        layer = nnx.eval_shape(
            lambda: Linear({"heads": 4, "head_dim": 3}, {"embed": 6}, bias=True, std=1.0, rngs=nnx.Rngs(0))
        )
        state = nnx.split(layer)[1]
        specs = parameter_specs(state)
        assert {name: spec.role for name, spec in specs.items()} == {"kernel": "kernel", "bias": "bias"}
        # the bias of a row-parallel layer is whole everywhere: it is small, and added after the sum
        assert {name: spec.layout.spec for name, spec in specs.items()} == {
            "kernel": PartitionSpec(("tensor",), (), ("fsdp",)),
            "bias": PartitionSpec(()),
        }


@pytest.mark.parametrize("sequence", ["seq", "full_seq"])
def test_partial_sums_are_reduced_on_the_way(rules_for, in_region, sequence):
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(2, 8, 16)), generator.normal(size=(16, 6))
    expected = x @ kernel
    with use(rules_for(tensor=4)) as rules:
        place = lambda array, *spec: jax.device_put(  # noqa: E731
            array.astype(np.float32), NamedSharding(rules.mesh, PartitionSpec(*spec))
        )
        run = in_region(lambda x, kernel: project(x, kernel, ("batch", sequence, "embed")))
        y = run(place(x, None, None, "tensor"), place(kernel, "tensor", None))
    assert y.sharding.spec[1] == ("tensor" if sequence == "seq" else None)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

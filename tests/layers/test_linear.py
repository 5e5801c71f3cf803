"""Products over several named dimensions."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.layers.config import LoraConfig
from jaxtron.layers.inputs import LayerInputs, row_keys
from jaxtron.layers.linear import Adapter, Linear, project
from jaxtron.sharding.parameters import parameter_specs
from jaxtron.sharding.rules import use


@pytest.mark.parametrize("bias", [True, False])
def test_named_dimensions_are_contracted_and_made(rules_for, bias):
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    with use(rules_for(data=1)):
        layer = Linear({"heads": 4, "head_dim": 3}, {"embed": 6}, bias=bias, std=1.0, rngs=nnx.Rngs(0))
        if bias:
            layer.bias[...] = layer.bias[...] + np.arange(6)
        y = layer(x, "batch", "seq", "embed", inputs=LayerInputs())
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


def test_an_adapter_drops_its_input_and_each_pair_its_own(rules_for):
    """Adapters that hand on their input, times the scale of 3: what comes out is what dropout left of it."""
    x = np.random.default_rng(0).uniform(1, 2, (4, 64, 16)).astype(np.float32)
    keys = LayerInputs(keys=row_keys(jax.random.key(1), np.arange(4)))
    config = LoraConfig(rank=16, alpha=48, dropout=0.25)

    def of(adapter: Adapter, inputs: LayerInputs, *logical: str) -> np.ndarray:
        a, b = (np.zeros(weight[...].shape, np.float32) for weight in (adapter.a, adapter.b))
        one = np.eye(16, dtype=np.float32)
        a[...], b[...] = one if a.ndim == 2 else one[:, None], one
        adapter.a[...], adapter.b[...] = a, b
        return np.asarray(adapter(x, *logical, inputs=inputs))

    with use(rules_for(data=1)):
        first, second = (Adapter({"embed": 16}, {"mlp": 16}, config, site, nnx.Rngs(0)) for site in (7, 8))
        gated = Adapter({"embed": 16}, {"gate": 2, "mlp": 16}, config, 9, nnx.Rngs(0))
        names = ("batch", "full_seq", "mlp")
        np.testing.assert_allclose(of(first, LayerInputs(), *names), 3 * x, rtol=1e-6)
        pair = of(gated, keys, "batch", "full_seq", "gate", "mlp")
        found = [of(first, keys, *names), of(second, keys, *names), pair[:, :, 0], pair[:, :, 1]]
        np.testing.assert_array_equal(found[0], of(first, keys, *names))
    for one in found:
        np.testing.assert_allclose(one[one != 0], (4 * x)[one != 0], rtol=1e-6)
        assert abs((one == 0).mean() - 0.25) < 0.03
    # both of two are dropped as often as two draws say
    for number, one in enumerate(found):
        for other in found[:number]:
            assert abs(((one == 0) & (other == 0)).mean() - 0.25**2) < 0.03

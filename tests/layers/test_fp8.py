"""Products of 8-bit numbers: each within the error of its format, and the same tensor's scale on every mesh.

Some tests are of what others were told: a maximum that not all devices knew (TransformerEngine 335, Megatron-LM 442),
zeros that became NaN (torchao 4713), sizes that are no multiple of 16 (torchao 571, TransformerEngine 1422), other
numbers where a layer is computed again (TransformerEngine 1190).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.kernels.block_products.rounding import divided
from jaxtron.layers import fp8
from jaxtron.layers.fp8 import FORWARD, GRADIENT, product, scale_of
from jaxtron.layers.linear import project
from jaxtron.sharding.rules import constrain, use
from tests.support.equivalence import MODELS, ONE_DEVICE, changed, loss_and_gradients

# half a unit in the last place of a number, and half the least number beside zero
RELATIVE = {FORWARD: 2.0**-4, GRADIENT: 2.0**-3}
ABSOLUTE = {FORWARD: 2.0**-10, GRADIENT: 2.0**-17}
# rows, inputs and outputs: of the second none is a multiple of 16, or of 2
SIZES = [(64, 48, 32), (37, 51, 29)]
# Of a whole step. Sums in another order differ in their last bits, and where one lies between two numbers of 8 bits it
# is rounded the other way, by up to 12%: of a row of the batch the numbers behind it then differ as rounding does, and
# here one of 32 rows makes 2% of the gradients. Products alone are held to one device far more tightly.
TOLERANCE, DISTANCE = 2e-4, 0.04
LAYOUT = PartitionSpec(None, None)
FORM = fp8.Form(1, LAYOUT, LAYOUT, LAYOUT)


def lumpy(seed: int, *shape: int) -> np.ndarray:
    """Numbers over six orders of magnitude, of either sign."""
    generator = np.random.default_rng(seed)
    return (generator.normal(size=shape) * np.exp(2 * generator.normal(size=shape))).astype(np.float32)


def error_of(x: np.ndarray, dtype) -> np.ndarray:
    """The most that rounding changes each number."""
    scale = float(2.0 ** np.ceil(np.log2(np.abs(x).max() / float(jnp.finfo(dtype).max))))
    return RELATIVE[dtype] * np.abs(x) + ABSOLUTE[dtype] * scale


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_product_is_within_the_error_of_its_format(rules_for, sizes, dtype):
    rows, inputs, outputs = sizes
    given = (lumpy(1, rows, inputs), lumpy(2, inputs, outputs), lumpy(3, rows, outputs))
    arrays = [jnp.asarray(array, dtype) for array in given]
    x, kernel, dy = (np.asarray(array, np.float64) for array in arrays)
    with use(rules_for(data=1)):
        y, pull = jax.vjp(functools.partial(product, form=FORM), *arrays[:2])
        found = dict(zip(("y", "dx", "dkernel"), (y, *pull(arrays[2])), strict=True))
    operands = {"y": (x, kernel), "dx": (dy, kernel.T), "dkernel": (x.T, dy)}
    for name, (left, right) in operands.items():
        assert found[name].dtype == dtype
        of_left, of_right = (error_of(one, GRADIENT if np.shares_memory(one, dy) else FORWARD) for one in (left, right))
        # of the products, and of the sum's own type
        most = of_left @ np.abs(right) + np.abs(left) @ of_right + of_left @ of_right
        most += 2 * float(jnp.finfo(dtype).eps) * (np.abs(left) @ np.abs(right))
        wrong = np.abs(np.asarray(found[name], np.float64) - left @ right)
        assert (wrong <= most).all(), name
        # and no better: it is made of numbers with three bits of fraction or two
        assert 0.005 < np.linalg.norm(wrong) / np.linalg.norm(left @ right) < 0.15, name


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT], ids=["e4m3", "e5m2"])
def test_a_scale_is_a_power_of_two_that_wastes_no_more_than_half(rules_for, dtype):
    with use(rules_for(data=1)):
        for peak in (*2.0 ** np.arange(-40, 100, 7), *np.nextafter(2.0 ** np.arange(-9, 9), np.inf, dtype=np.float32)):
            x = jnp.asarray([0.0, peak, -peak, peak / 3], jnp.float32)
            scale = scale_of(x, dtype)
            assert np.frexp(float(scale))[0] == 0.5
            most = float(jnp.abs(divided(x, scale, dtype)).max())
            assert float(jnp.finfo(dtype).max) / 2 < 1.2 * most <= 1.2 * float(jnp.finfo(dtype).max)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "kernel", "gradient"])
def test_zeros_are_multiplied_as_zeros(rules_for, which):
    arrays = [jnp.asarray(lumpy(seed, 8, 8)) for seed in range(3)]
    arrays[which] = jnp.zeros((8, 8))
    with use(rules_for(data=1)):
        y, pull = jax.vjp(functools.partial(product, form=FORM), *arrays[:2])
        found = (y, *pull(arrays[2]))
    # each is made of two of the three
    made_of = ((0, 1), (2, 1), (0, 2))
    for array, operands in zip(found, made_of, strict=True):
        assert np.isfinite(array).all() and bool(np.any(array)) == (which not in operands)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_finite_is_not_hidden(rules_for, bad, dtype):
    x, kernel = lumpy(1, 8, 8), lumpy(2, 8, 8)
    x[3, 5] = bad
    with use(rules_for(data=1)):
        y = product(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), FORM)
    assert not np.isfinite(np.asarray(y, np.float32)[3]).any()


MESHES = [{"data": 4}, {"fsdp": 2, "tensor": 2}, {"context": 4}, {"tensor": 4}, {"data": 2, "pipe": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_all_devices_know_the_largest_number_that_one_of_them_has(rules_for, mesh):
    x = lumpy(1, 8, 8, 4)
    x[5, 6, 2] = 3e4
    with use(rules_for(**{"data": 1, **mesh})) as rules:
        rows, sequence = rules.batch, (*rules.axes("context"), *rules.axes("tensor"))
        inner = PartitionSpec(rows, rules.axes("context"))
        place = NamedSharding(rules.mesh, PartitionSpec(rows, sequence))
        scales = jax.jit(
            jax.shard_map(
                lambda x: jnp.broadcast_to(scale_of(x, FORWARD), (1,)),
                in_specs=inner,
                out_specs=PartitionSpec(rules.manual),
                axis_names=set(rules.manual),
            )
        )(jax.device_put(x, place))
    assert set(np.asarray(scales)) == {2.0 ** np.ceil(np.log2(3e4 / 448))}


WAYS = {
    "column": (("batch", "seq", "embed"), ("embed", "mlp"), ("batch", "full_seq", "mlp")),
    "row": (("batch", "full_seq", "mlp"), ("mlp", "embed"), ("batch", "seq", "embed")),
    "whole": (("batch", "seq", "embed"), ("embed", "latent"), ("batch", "seq", "latent")),
}


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_product_are_those_of_one_device(rules_for, in_region, way):
    of_input, of_kernel, of_output = WAYS[way]
    arrays = (lumpy(1, 2, 8, 16), lumpy(2, 16, 12), lumpy(3, 2, 8, 12))

    def run(x, kernel, dy):
        x, dy = constrain(x, *of_input), constrain(dy, *of_output)
        multiply = lambda x, kernel: constrain(project(x, kernel, of_output, "current"), *of_output)  # noqa: E731
        y, pull = jax.vjp(multiply, x, kernel)
        return y, *pull(dy)

    found = []
    for tensor in (1, 4):
        with use(rules_for(tensor=tensor)) as rules:
            split = [rules.axes(*rules.parameters[name]) or None for name in of_kernel]
            places = (PartitionSpec(), PartitionSpec(*split), PartitionSpec())
            given = (
                jax.device_put(array, NamedSharding(rules.mesh, place))
                for array, place in zip(arrays, places, strict=True)
            )
            found.append([np.asarray(array) for array in in_region(run)(*given)])
    for one, other in zip(*found, strict=True):
        # the same rounded numbers, added in another order
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * np.abs(one).max())


# model, mesh, ZeRO; one microbatch, whose tensors are the same on every mesh
CASES = [
    ("gpt", {}, {"tensor": 8}, "optimizer"),
    ("llama", {"recompute": "full"}, {"data": 2, "fsdp": 2, "tensor": 2}, "parameters"),
    pytest.param(("gpt", {}, {"context": 4, "data": 2}, "optimizer"), marks=pytest.mark.slow),
    pytest.param(("llama", {}, {"tensor": 8}, "optimizer"), marks=pytest.mark.slow),
    pytest.param(("gpt", {}, {"pipe": 2, "data": 2, "tensor": 2}, "optimizer"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_one_device(case):
    name, changes, mesh, zero = case
    model = changed(MODELS[name], fp8={"scaling": "current"}, **changes)
    result, expected = loss_and_gradients(model, mesh, zero, 1), reference(name)
    assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert distance(result.gradients, expected.gradients) < DISTANCE


def test_a_layer_that_is_computed_again_computes_the_same():
    again = loss_and_gradients(
        changed(MODELS["gpt"], fp8={"scaling": "current"}, recompute="full"), ONE_DEVICE, "none", 1
    )
    assert again.loss == pytest.approx(reference("gpt").loss, rel=TOLERANCE)
    assert distance(again.gradients, reference("gpt").gradients) < DISTANCE


@functools.cache
def reference(name: str):
    return loss_and_gradients(changed(MODELS[name], fp8={"scaling": "current"}), ONE_DEVICE, "none", 1)


def test_a_step_is_near_that_of_wide_numbers_and_not_the_same():
    plain, found = loss_and_gradients(MODELS["gpt"], ONE_DEVICE, "none", 1), reference("gpt")
    assert found.loss != plain.loss and found.loss == pytest.approx(plain.loss, rel=0.01)
    # e4m3 rounds by 2.6% in the mean, e5m2 by twice as much, and several products follow each other here
    assert 0.05 < distance(found.gradients, plain.gradients) < 0.2


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The norm of the difference of all gradients together, against their norm."""
    squares = sum(np.square(array, dtype=np.float64).sum() for array in expected.values())
    return np.sqrt(sum(np.square(found[name] - array).sum() for name, array in expected.items()) / squares)

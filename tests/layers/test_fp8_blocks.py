"""Products of 8-bit numbers scaled by blocks: each within the error of its block's format, the same on every mesh whose
parts are whole blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.kernels.block_products.rounding import block_scales, by_blocks, by_columns, by_rows, spread
from jaxtron.layers.fp8 import Form
from jaxtron.layers.fp8_blocks import product
from jaxtron.layers.linear import project
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.sharding.rules import constrain, use
from tests.support.equivalence import MODELS, ONE_DEVICE, changed, loss_and_gradients

BLOCK = 128
# half a unit in the last place of e4m3, and half its least number beside zero; its largest
RELATIVE, ABSOLUTE, LARGEST = 2.0**-4, 2.0**-10, 448.0
# rows, inputs and outputs: the second has no whole block, of the third none is even
SIZES = [(256, 128, 384), (64, 48, 32), (301, 259, 141)]
LAYOUT = PartitionSpec(None, None)
FORM = Form(1, LAYOUT, LAYOUT, LAYOUT)


@jax.jit
def all_products(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    """The product, and the gradients of its input and kernel."""
    y, pull = jax.vjp(functools.partial(product, form=FORM), x, kernel)
    return y, *pull(dy)


BY_ROWS, BY_COLUMNS = jax.jit(by_rows), jax.jit(by_columns, static_argnames="runs")
# which of the input, the kernel and the output's gradient each of them is made of
MADE_OF = ((0, 1), (2, 1), (0, 2))


def lumpy(seed: int, *shape: int) -> np.ndarray:
    """Numbers over six orders of magnitude, of either sign, whose blocks differ by as much."""
    generator = np.random.default_rng(seed)
    return (generator.normal(size=shape) * np.exp(2 * generator.normal(size=shape))).astype(np.float32)


def error_of(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The most that rounding changes each number, of blocks of so many rows and columns."""
    peaks = np.zeros_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = np.s_[i : i + rows, j : j + columns]
            peaks[block] = np.abs(x[block]).max()
    return RELATIVE * np.abs(x) + ABSOLUTE * 2.0 ** np.ceil(np.log2(peaks / LARGEST))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_product_is_within_the_error_of_its_blocks(rules_for, sizes, dtype):
    rows, inputs, outputs = sizes
    given = (lumpy(1, rows, inputs), lumpy(2, inputs, outputs), lumpy(3, rows, outputs))
    arrays = [jnp.asarray(array, dtype) for array in given]
    x, kernel, dy = (np.asarray(array, np.float64) for array in arrays)
    with use(rules_for(data=1)):
        found = dict(zip(("y", "dx", "dkernel"), all_products(*arrays), strict=True))
    weights = error_of(kernel, BLOCK, BLOCK)
    operands = {
        "y": (x, error_of(x, 1, BLOCK), kernel, weights),
        "dx": (dy, error_of(dy, 1, BLOCK), kernel.T, weights.T),
        "dkernel": (x.T, error_of(x, BLOCK, 1).T, dy, error_of(dy, BLOCK, 1)),
    }
    for name, (left, of_left, right, of_right) in operands.items():
        assert found[name].dtype == dtype
        most = of_left @ np.abs(right) + np.abs(left) @ of_right + of_left @ of_right
        most += 2 * float(jnp.finfo(dtype).eps) * (np.abs(left) @ np.abs(right))
        wrong = np.abs(np.asarray(found[name], np.float64) - left @ right)
        assert (wrong <= most).all(), name
        # and no better: it is made of numbers with three bits of fraction
        assert 0.005 < np.linalg.norm(wrong) / np.linalg.norm(left @ right) < 0.1, name


def test_a_block_far_smaller_than_another_keeps_its_numbers(rules_for):
    x = lumpy(1, 4, 384) * np.repeat(np.float32([1e6, 1.0, 1e-9]), BLOCK)
    found, scales = by_rows(jnp.asarray(x)[None])
    wide = np.asarray(found[0], np.float32) * np.asarray(spread(jnp.moveaxis(scales, 0, 2), 2, 384))[0]
    assert (np.abs(wide - x) <= error_of(x, 1, BLOCK)).all()
    # of one scale for all nothing would be left
    assert np.linalg.norm((wide - x)[:, 256:]) < 0.05 * np.linalg.norm(x[:, 256:])


def test_tiles_of_columns_are_those_of_the_transpose(rules_for):
    x = jnp.asarray(lumpy(1, 2, 256, 48))
    values, scales = BY_COLUMNS(x, runs=2)
    assert values.shape == (2, 2, 48, 128) and scales.shape == (2, 2, 1, 48)
    for run in range(2):
        for row in range(2):
            # a run and row are one tile of each column
            wanted, of_wanted = BY_ROWS(x[None, row, 128 * run : 128 * (run + 1)].swapaxes(1, 2))
            np.testing.assert_array_equal(values[run, row], wanted[0])
            np.testing.assert_array_equal(scales[run, row, 0], of_wanted[0, 0])


def test_runs_that_are_no_whole_tiles_have_zeros_behind_them(rules_for):
    values, _ = BY_COLUMNS(jnp.asarray(lumpy(1, 1, 100, 8)), runs=2)
    assert values.shape == (2, 1, 8, 128)
    assert not np.asarray(values[..., 50:], np.float32).any() and np.asarray(values[..., 49], np.float32).all()


def test_scales_are_powers_of_two_that_waste_no_more_than_half():
    kernel = jnp.asarray(lumpy(1, 200, 300))
    scales = block_scales(kernel)
    assert scales.shape == (2, 3) and (np.frexp(scales)[0] == 0.5).all()
    values = np.abs(np.asarray(by_blocks(kernel, scales), np.float32))
    peaks = [values[i : i + BLOCK, j : j + BLOCK].max() for i in (0, BLOCK) for j in (0, BLOCK, 2 * BLOCK)]
    assert all(LARGEST / 2 < 1.2 * peak and peak <= LARGEST for peak in peaks)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "kernel", "gradient"])
def test_zeros_are_multiplied_as_zeros(rules_for, which):
    arrays = [jnp.asarray(lumpy(seed, 8, 8)) for seed in range(3)]
    arrays[which] = jnp.zeros((8, 8))
    with use(rules_for(data=1)):
        found = all_products(*arrays)
    for array, operands in zip(found, MADE_OF, strict=True):
        assert np.isfinite(array).all() and bool(np.any(array)) == (which not in operands)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_finite_is_not_hidden(rules_for, bad, dtype):
    for which in range(3):
        arrays = [lumpy(seed, 8, 8) for seed in range(3)]
        arrays[which][3, 5] = bad
        with use(rules_for(data=1)):
            found = all_products(*(jnp.asarray(array, dtype) for array in arrays))
        for array, operands in zip(found, MADE_OF, strict=True):
            assert np.isfinite(np.asarray(array, np.float32)).all() == (which not in operands)


WAYS = {
    "column": (("batch", "seq", "embed"), ("embed", "mlp"), ("batch", "full_seq", "mlp")),
    "gated": (("batch", "seq", "embed"), ("embed", "gate", "mlp"), ("batch", "full_seq", "gate", "mlp")),
    "row": (("batch", "full_seq", "mlp"), ("mlp", "embed"), ("batch", "seq", "embed")),
    "whole": (("batch", "seq", "embed"), ("embed", "latent"), ("batch", "seq", "latent")),
}
LENGTH, WIDTH, INNER = 4 * BLOCK, 4 * BLOCK, 4 * BLOCK


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_product_are_those_of_one_device(rules_for, in_region, way):
    of_input, of_kernel, of_output = WAYS[way]
    sizes = {"batch": 2, "seq": LENGTH, "full_seq": LENGTH, "embed": WIDTH, "mlp": INNER, "latent": 96, "gate": 2}
    arrays = [
        lumpy(seed, *(sizes[name] for name in names)) for seed, names in enumerate((of_input, of_kernel, of_output))
    ]

    def run(x, kernel, dy):
        x, dy = constrain(x, *of_input), constrain(dy, *of_output)
        multiply = lambda x, kernel: constrain(project(x, kernel, of_output, "block"), *of_output)  # noqa: E731
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
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6 * np.abs(one).max())


MODEL = ModelConfig(
    num_layers=1,
    hidden_size=2 * BLOCK,
    num_heads=2,
    num_kv_heads=2,
    mlp_size=2 * BLOCK,
    vocab_size=60,
    vocab_multiple=64,
    activation="swiglu",
    norm="rms_norm",
    bias=False,
    position="rotary",
)
ROWS, TOKENS = 8, 2 * BLOCK
# As in `test_fp8.py`: sums in another order are rounded the other way here and there.
TOLERANCE, DISTANCE = 2e-4, 0.04


def step(mesh: dict[str, int], zero: str = "none", overlap_tensor: bool | None = None, **changes):
    model = changed(MODEL, fp8={"scaling": "block"}, **changes)
    return loss_and_gradients(model, mesh, zero, 1, rows=ROWS, length=TOKENS, mean=100, overlap_tensor=overlap_tensor)


@functools.cache
def reference():
    return step(ONE_DEVICE)


CASES = [
    ({"tensor": 2}, "optimizer", {"recompute": "full"}),
    ({"data": 2, "fsdp": 2}, "parameters", {}),
    pytest.param(({"fsdp": 2, "tensor": 2}, "parameters", {}), marks=pytest.mark.slow),
    pytest.param(({"tensor": 2}, "optimizer", {"overlap_tensor": True}), marks=pytest.mark.slow),
    pytest.param(({"context": 2}, "optimizer", {}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_one_device(case):
    mesh, zero, changes = case
    result, expected = step(mesh, zero, **changes), reference()
    assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert distance(result.gradients, expected.gradients) < DISTANCE


def test_a_step_is_near_that_of_wide_numbers_and_not_the_same():
    model = MODELS["gpt"]
    plain, found = (
        loss_and_gradients(changed(model, fp8={"scaling": scaling}), ONE_DEVICE, "none", 1)
        for scaling in ("none", "block")
    )
    assert found.loss != plain.loss and found.loss == pytest.approx(plain.loss, rel=0.01)
    # e4m3 rounds by 2.6% in the mean, and several products follow each other here
    assert 0.03 < distance(found.gradients, plain.gradients) < 0.12


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The norm of the difference of all gradients together, against their norm."""
    squares = sum(np.square(array, dtype=np.float64).sum() for array in expected.values())
    return np.sqrt(sum(np.square(found[name] - array).sum() for name, array in expected.items()) / squares)

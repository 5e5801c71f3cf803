"""Halves of a microbatch side by side: the same step as whole, on meshes that split layers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtron.models.decoder import stack
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.halves import LEAST_TOKENS, halve, join, split_of
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import use
from tests.support.equivalence import (
    MODELS,
    ROWS,
    assert_equal,
    changed,
    loss_and_gradients,
    one_device,
    rules_for,
)

# 32 rows in so many microbatches are two, or one, on each of the devices that share them
TWO, ONE = ROWS // 4, ROWS // 2
PIPE = PipelineConfig(schedule="interleaved", chunks=2)
REGIONS: dict[str, Any] = {"recompute": ["attention", "mlp"]}
CASES = [
    ("gpt with dropout", {"data": 2, "tensor": 4}, TWO, {}, {}),
    ("gpt with dropout", {"data": 2, "tensor": 4}, ONE, {}, {}),
    # two key/value heads on four parts are copied to those that share one
    ("llama", {"data": 2, "tensor": 4}, ONE, {}, {}),
    ("llama", {"data": 2, "tensor": 2}, TWO, {}, REGIONS),
    ("palm", {"fsdp": 2, "tensor": 2}, ONE, {}, {"recompute": "full"}),
    ("gemma", {"data": 2, "tensor": 2}, ONE, {}, {**REGIONS, "num_layers": 2}),
    ("gpt with dropout", {"data": 2, "context": 2, "tensor": 2}, ONE, {"context": ContextConfig()}, {}),
    ("llama", {"data": 2, "context": 2, "tensor": 2}, TWO, {"context": ContextConfig(method="all_gather")}, {}),
    ("gpt", {"pipe": 2, "data": 2, "tensor": 2}, ONE, {"pipeline": PIPE}, {"num_layers": 4}),
]


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What layers were split by."""
    found = []

    def spy(x: jax.Array) -> str | None:
        found.append(split_of(x))
        return found[-1]

    monkeypatch.setattr(stack, "split_of", spy)
    return found


@pytest.mark.parametrize(
    ("name", "mesh", "microbatches", "more", "changes"),
    [pytest.param(*case, marks=() if number < 2 else pytest.mark.slow) for number, case in enumerate(CASES)],
    ids=str,
)
def test_halves_make_the_step_that_the_whole_makes(splits, name, mesh, microbatches, more, changes):
    model = changed(MODELS[name], **changes)
    found = loss_and_gradients(model, mesh, "optimizer", microbatches, overlap_tensor=True, **more)
    assert set(splits) == {"rows" if microbatches == TWO else "positions"}
    expected = one_device(name, changes.get("num_layers"))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_equal(found.gradients, expected.gradients)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [TWO, ONE])
def test_halves_of_packed_documents_with_their_own_positions(splits, microbatches):
    # a pattern that repeats: where it never does nothing is split
    arguments = (changed(MODELS["gemma"], num_layers=2), {"data": 2, "tensor": 2}, "optimizer", microbatches)
    found = loss_and_gradients(*arguments, packed=True, overlap_tensor=True)
    assert set(splits) == {"rows" if microbatches == TWO else "positions"}
    whole = loss_and_gradients(*arguments, packed=True, overlap_tensor=False)
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    assert_equal(found.gradients, whole.gradients)


def split_with(asked: bool | None, kind: str, rows: int, length: int, tensor: int) -> str | None:
    """What a step would split of so many rows of such length on devices of this kind."""
    found = []
    rules = rules_for({"tensor": tensor}, overlap_tensor=asked)
    with use(dataclasses.replace(rules, stands_for=kind)):

        def look() -> jax.Array:
            found.append(split_of(jnp.zeros((rows, length, 8))))
            return jnp.zeros(())

        jax.eval_shape(region(look, (), PartitionSpec()))
    return found[0]


def test_what_is_split_and_where_nothing_is():
    gpu, tokens = "NVIDIA H100 80GB HBM3", 2 * LEAST_TOKENS
    assert split_with(None, gpu, 2, tokens // 2, 2) == "rows"
    assert split_with(None, gpu, 1, tokens, 2) == split_with(None, gpu, 3, tokens, 2) == "positions"
    assert split_with(None, gpu, 1, tokens + 2, 2) is None
    assert split_with(None, "cpu", 2, tokens, 2) is split_with(None, gpu, 2, tokens, 1) is None
    assert split_with(False, gpu, 2, tokens, 2) is split_with(True, gpu, 1, 6, 2) is None
    assert split_with(True, "cpu", 2, 4, 2) == "rows"


@pytest.mark.parametrize("logical", [PartitionSpec(None, "seq"), PartitionSpec(None, None, "heads")], ids=str)
def test_halves_are_split_and_joined_without_a_message(logical):
    rules = rules_for({"tensor": 4})
    layout = PartitionSpec(*(rules.axes("tensor") if name else None for name in logical))
    x = np.arange(3 * 16 * 4, dtype=np.float32).reshape(3, 16, 4)
    with use(rules):
        array = jax.device_put(x, jax.sharding.NamedSharding(rules.mesh, layout))
        run: Callable = jax.jit(lambda x: (halve(x, "positions"), join(*halve(x, "positions"), "positions")))
        assert "all-" not in (text := run.lower(array).compile().as_text()) and "permute" not in text
        (first, second), whole = run(array)
    np.testing.assert_array_equal(whole, x)
    # of each of four parts of four positions the first two, and the others
    places = np.arange(16).reshape(4, 4)
    np.testing.assert_array_equal(first, x[:, places[:, :2].ravel()])
    np.testing.assert_array_equal(second, x[:, places[:, 2:].ravel()])

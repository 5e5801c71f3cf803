"""Backwards whose products are left to who adds them: which are found, and that gradients stay what they are."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.kernels.selection import Backend
from jaxtron.kernels.weight_sums import reference
from jaxtron.kernels.weight_sums.spec import Operand
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.weight_products import Summands, add_products, open_backward
from jaxtron.run import session
from jaxtron.sharding.rules import use
from jaxtron.typing import Array, Float, Int
from tests.support.equivalence import (
    LENGTH,
    MODELS,
    ONE_STAGE,
    ROWS,
    SCANNED,
    assert_equal,
    changed,
    loss_and_gradients,
    one_device,
)

SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Sums:
    """The reference, with the shapes of what it adds to: inputs and outputs on a device. Fewer than `least` inputs it
    does not take."""

    least: int = 0
    shapes: set[tuple[int, int]] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)

    def unsupported_reason(self, x: Operand, cotangent: Operand, device_kind: str) -> str | None:
        return "too few" if x.shape[1] < self.least else None

    def add(
        self,
        sums: Float[Array, "L I O"],
        x: Float[Array, "R I"],
        cotangent: Float[Array, "R O"],
        slot: Int[Array, ""],
    ) -> Float[Array, "L I O"]:
        self.shapes.add(sums.shape[1:])
        self.rows.add(x.shape[0])
        return reference.add(sums, x, cotangent, slot)


HEADS = {(32, 32), (32, 8), (32, 16)}
# of the models' layers by (inputs, outputs): queries and output, keys and values, MLP up and down
GPT, LLAMA = {(32, 32), (32, 128), (128, 32)}, {(64, 32), (32, 64), (32, 16), (32, 96), (48, 32)}
# on two tensor parts
GPT_HALVES, LLAMA_HALVES = {(32, 16), (16, 32), (32, 64), (64, 32)}, {(32, 32), (32, 8), (32, 48), (24, 32)}


@pytest.mark.parametrize(
    ("name", "mesh", "microbatches", "pipeline", "found"),
    [
        ("gpt", {"data": 1}, 2, ONE_STAGE, GPT),
        ("llama", {"data": 2, "tensor": 2}, 2, ONE_STAGE, LLAMA_HALVES),
        ("gpt", {"pipe": 2, "tensor": 2}, 2, PipelineConfig(schedule="zero_bubble"), GPT_HALVES),
        pytest.param("llama", {"data": 1}, 2, ONE_STAGE, LLAMA, marks=SLOW),
        pytest.param("gpt", {"pipe": 2, "tensor": 2}, 4, PipelineConfig(schedule="1f1b"), GPT_HALVES, marks=SLOW),
        pytest.param("gpt with dropout", {"tensor": 2, "context": 2}, 2, ONE_STAGE, GPT_HALVES, marks=SLOW),
        # three tensor parts more than there are heads of keys and values
        pytest.param("palm", {"tensor": 2}, 2, ONE_STAGE, None, marks=SLOW),
    ],
    ids=str,
)
def test_gradients_are_the_same(monkeypatch, name, mesh, microbatches, pipeline, found) -> None:
    sums = Sums()
    monkeypatch.setattr(session, "select_backend", lambda *_: Backend("reference", sums, ""))
    model = changed(MODELS[name], **SCANNED)
    result = loss_and_gradients(model, mesh, "none", microbatches, pipeline)
    assert found is None or sums.shapes == found
    expected = one_device(name)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_equal(result.gradients, expected.gradients)


def test_halves_of_a_microbatch_are_added_one_after_the_other(monkeypatch) -> None:
    """Of two products that are each over half of the rows the sum is not made first."""
    sums = Sums()
    monkeypatch.setattr(session, "select_backend", lambda *_: Backend("reference", sums, ""))
    model = changed(MODELS["gpt"], **SCANNED)
    result = loss_and_gradients(model, {"data": 2, "tensor": 2}, "none", ROWS // 2, overlap_tensor=True)
    assert sums.shapes == GPT_HALVES and sums.rows == {LENGTH // 2}
    assert_equal(result.gradients, one_device("gpt").gradients)


def test_what_is_reduced_before_it_is_added_is_made_first(monkeypatch) -> None:
    """Weights that are gathered at use: their gradients are scattered over the batch axes."""
    sums = Sums()
    monkeypatch.setattr(session, "select_backend", lambda *_: Backend("reference", sums, ""))
    result = loss_and_gradients(changed(MODELS["gpt"], **SCANNED), {"fsdp": 2}, "parameters", 2)
    assert not sums.shapes
    assert_equal(result.gradients, one_device("gpt").gradients)


def opened(function, weights: dict[str, Array], sums: Sums) -> dict[str, Array | Summands]:
    """A function's gradients, as its opened backward gives them."""
    cotangent = jnp.ones(jax.eval_shape(function, weights).shape)
    names = sorted(weights)

    def pull(cotangent: Array, weights: dict[str, Array]) -> list[Array]:
        return jax.tree.leaves(jax.vjp(function, weights)[1](cotangent)[0])

    found = open_backward(pull, cotangent, weights, len(names), sums).run(cotangent, weights)
    return dict(zip(names, found, strict=True))


def test_products_are_found_by_what_becomes_of_them(rules_for) -> None:
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(3, 5, 8)), jnp.float32)

    def weight(*shape: int) -> Array:
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    weights = {
        "joined a": weight(8, 2, 3),
        "joined b": weight(8, 2, 4),
        "plain": weight(8, 6),
        "scaled": weight(8, 6),
        "small": weight(2, 6),
        "twice": weight(8, 6),
        "vector": weight(6),
    }

    def function(weights: dict[str, Array]) -> Array:
        joined = jnp.concatenate([weights["joined a"], weights["joined b"]], -1)
        first = jnp.einsum("bse,ehd->bshd", x, joined).reshape(3, 5, 14)
        y = x @ weights["plain"] + x @ (2.0 * weights["scaled"]) + x[..., :2] @ weights["small"]
        y = jnp.tanh(y) @ weights["plain"].T @ weights["twice"] + jnp.sin(x) @ weights["twice"]
        return (y * weights["vector"]).sum(-1, keepdims=True) + jnp.sin(first).sum(-1, keepdims=True)

    sums = Sums(least=4)
    with use(rules_for(data=1)), jax.set_mesh(rules_for(data=1).mesh):
        values = opened(function, weights, sums)
        made = {
            name: add_products(jnp.zeros((1, *weights[name].shape)), value, 0, sums)[0]
            if isinstance(value, tuple)
            else value
            for name, value in values.items()
        }
    # what is used twice is a sum of two products; a factor comes after one, and two inputs are too few
    found = {name: len(value) for name, value in values.items() if isinstance(value, tuple)}
    assert found == {"joined a": 1, "joined b": 1, "plain": 2, "twice": 2}
    expected = jax.grad(lambda weights: function(weights).sum())(weights)
    for name, gradient in expected.items():
        np.testing.assert_allclose(made[name], gradient, rtol=1e-5, atol=1e-5)

"""A second family, which is one folder: what trains a decoder trains it, on every kind of mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.run.configuration import configuration_of
from jaxtron.run.session import make_trainer
from jaxtron.run.step import batch_sharding
from jaxtron.sharding.rules import use
from tests.support.equivalence import TOLERANCE, assert_equal, by_name, make_params, rules_for
from tests.toy_family.program import ToyBatch

ROWS, LENGTH, VOCAB = 8, 16, 60
FAMILY = "tests.toy_family"


def make_batch() -> ToyBatch:
    """Rows with ever other counts of tokens, a third of them without a label."""
    generator = np.random.default_rng(0)
    tokens, targets = generator.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    weights = (generator.random((ROWS, LENGTH)) > 0.4).astype(np.float32)
    return ToyBatch(tokens, targets, weights, tokens[:, 0] % 2, (np.arange(ROWS) % 3 > 0).astype(np.float32))


def step(mesh: dict[str, int], schedule: str = "1f1b"):
    """Metrics and gradients of a step on this mesh."""
    model = {"family": FAMILY, "vocab_size": VOCAB, "encoder_layers": 4, "decoder_layers": 4}
    train = {"global_batch": ROWS, "microbatches": 2, "precision": "fp32"}
    settings = {"model": model, "train": train, "mesh": {"data": 1, **mesh}, "data": {"sequence_length": LENGTH}}
    config = configuration_of(FAMILY).model_validate(settings | {"pipeline": {"schedule": schedule}})
    with use(rules_for(mesh)):
        trainer = make_trainer(config)
        batch = jax.device_put(make_batch(), batch_sharding())
        run = jax.jit(trainer.loss_and_gradients)
        metrics, gradients = run(make_params(trainer), batch, jnp.int32(0), jnp.float32(1))
        return {name: np.asarray(value) for name, value in metrics.items()}, by_name(gradients, trainer)


one_device = functools.cache(lambda: step({"data": 1}))


@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [
        ({"data": 2, "tensor": 2}, "1f1b"),
        pytest.param({"context": 2}, "1f1b", marks=pytest.mark.slow),
        ({"pipe": 2, "context": 2}, "interleaved"),
        pytest.param({"fsdp": 2, "data": 2}, "1f1b", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_metrics_and_every_gradient_equal_one_device(mesh, schedule):
    metrics, gradients = step(mesh, schedule)
    expected, expected_gradients = one_device()
    assert metrics.keys() == expected.keys() >= {"loss", "text", "label", "encoder/layers/square"}
    assert metrics["loss"] == pytest.approx(float(metrics["text"] + metrics["label"]), rel=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=TOLERANCE)
    # a row for each layer, in the model's order
    assert metrics["decoder/layers/square"].shape == (4,) and len(set(metrics["decoder/layers/square"].tolist())) == 4
    assert_equal(gradients, expected_gradients)

"""Loss and every gradient do not depend on how many devices a sequence lies on, nor on how attention crosses them."""

import functools

import pytest

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.sharding.config import ContextConfig
from tests.support.equivalence import MODELS, ONE_DEVICE, SCANNED, Result, assert_equal, changed, loss_and_gradients

TOLERANCE = 1e-5
FSDP_INSIDE = ("pipe", "data", "context", "fsdp", "tensor")
STAGES_INSIDE = ("data", "context", "fsdp", "tensor", "pipe")
SLOW = pytest.mark.slow


def model(name: str) -> ModelConfig:
    return changed(MODELS[name], **SCANNED)


@functools.cache
def one_device(name: str) -> Result:
    return loss_and_gradients(model(name), ONE_DEVICE, "none", 1)


@pytest.mark.parametrize(
    ("name", "mesh", "context", "microbatches"),
    [
        pytest.param("llama", {"context": 4, "tensor": 2}, {"method": "ring"}, 1, marks=SLOW),
        ("gpt with dropout", {"context": 2}, {"method": "all_to_all"}, 1),
        ("llama", {"fsdp": 2, "context": 2, "tensor": 2, "order": FSDP_INSIDE}, {"method": "ring"}, 2),
        pytest.param("gpt with dropout", {"context": 2, "fsdp": 2}, {"method": "ring"}, 2, marks=SLOW),
        pytest.param("llama", {"context": 2, "data": 2, "tensor": 2}, {"method": "all_gather"}, 1, marks=SLOW),
        pytest.param("gpt with dropout", {"context": 2, "tensor": 2}, {"method": "all_to_all"}, 1, marks=SLOW),
        pytest.param("llama", {"context": 8}, {"method": "ring"}, 1, marks=SLOW),
        pytest.param("palm", {"context": 2, "tensor": 2, "fsdp": 2}, {"method": "ring"}, 2, marks=SLOW),
        pytest.param("gpt with dropout", {"context": 4}, {"method": "hierarchical", "inner": 2}, 1, marks=SLOW),
        pytest.param("gpt with dropout", {"context": 4, "data": 2}, {"method": "all_to_all"}, 1, marks=SLOW),
        pytest.param("palm", {"context": 8}, {"method": "all_gather"}, 1, marks=SLOW),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_one_device(name: str, mesh: dict, context: dict, microbatches: int):
    found = loss_and_gradients(model(name), mesh, "optimizer", microbatches, context=ContextConfig(**context))
    expected = one_device(name)
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert_equal(found.gradients, expected.gradients, TOLERANCE)


@pytest.mark.parametrize(
    ("schedule", "mesh"),
    [
        ("1f1b", {"pipe": 2, "context": 2, "tensor": 2}),
        pytest.param("zero_bubble", {"pipe": 2, "context": 4}, marks=SLOW),
        pytest.param("1f1b", {"pipe": 2, "fsdp": 2, "context": 2, "order": STAGES_INSIDE}, marks=SLOW),
    ],
)
def test_with_pipelines(schedule: str, mesh: dict):
    pipeline = PipelineConfig(schedule=schedule)
    found = loss_and_gradients(model("llama"), mesh, "optimizer", 2, pipeline, context=ContextConfig())
    expected = one_device("llama")
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert_equal(found.gradients, expected.gradients, TOLERANCE)


@functools.cache
def one_device_packed(name: str) -> Result:
    return loss_and_gradients(model(name), ONE_DEVICE, "none", 1, packed=True)


@pytest.mark.parametrize(
    ("name", "mesh", "context", "microbatches"),
    [
        ("gemma", {"context": 4, "tensor": 2}, {"method": "ring"}, 2),
        pytest.param("gemma", {"context": 2, "fsdp": 2}, {"method": "all_gather"}, 1, marks=SLOW),
        pytest.param("gemma", {"context": 2, "tensor": 2}, {"method": "all_to_all"}, 1, marks=SLOW),
        pytest.param("gpt with dropout", {"context": 4}, {"method": "hierarchical", "inner": 2}, 1, marks=SLOW),
        pytest.param("palm", {"context": 8}, {"method": "ring"}, 1, marks=SLOW),
        pytest.param("gemma", {"data": 2, "fsdp": 2, "tensor": 2}, {}, 2, marks=SLOW),
        pytest.param("llama", {"tensor": 2}, {}, 2, marks=SLOW),
    ],
    ids=str,
)
def test_packed_documents(name: str, mesh: dict, context: dict, microbatches: int):
    config = ContextConfig(**context)
    found = loss_and_gradients(model(name), mesh, "optimizer", microbatches, context=config, packed=True)
    expected = one_device_packed(name)
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert_equal(found.gradients, expected.gradients, TOLERANCE)


@pytest.mark.parametrize(
    ("schedule", "mesh"),
    [("1f1b", {"pipe": 2, "context": 2, "tensor": 2}), ("zero_bubble", {"pipe": 2, "context": 2})],
)
@pytest.mark.slow
def test_packed_documents_in_pipelines(schedule: str, mesh: dict):
    pipeline = PipelineConfig(schedule=schedule)
    found = loss_and_gradients(model("llama"), mesh, "optimizer", 2, pipeline, context=ContextConfig(), packed=True)
    assert_equal(found.gradients, one_device_packed("llama").gradients, TOLERANCE)


def test_documents_matter():
    """Without their segments or positions the gradients are others, and so are they without windows or sinks."""
    packed = one_device_packed("llama")
    assert packed.loss != pytest.approx(loss_and_gradients(model("llama"), ONE_DEVICE, "none", 1).loss, rel=1e-4)
    assert "sinks" in " ".join(one_device_packed("gemma").gradients)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=SLOW)])
def test_an_implementation_equals_whole_scores(implementation: str):
    attention = {"implementation": implementation}
    found = loss_and_gradients(changed(model("llama"), attention=attention), {"tensor": 2}, "optimizer", 1)
    assert_equal(found.gradients, one_device("llama").gradients, TOLERANCE)

"""The central promise: loss, every gradient and every update are those of one device, on every mesh.

What one device computes is held against plain JAX in `tests/models/test_decoder.py`; pipelines have their own file, and
every family and kind of layer is on every kind of mesh in `tests/conformance`.
"""

import functools
import math

import jax
import numpy as np
import pytest

from jaxtron.optim.config import LossScaleConfig
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.folding import FLAGS
from tests.support.equivalence import (
    CUBE,
    GPT,
    MODELS,
    ONE_DEVICE,
    SCANNED,
    TOLERANCE,
    Steps,
    assert_equal,
    assert_steps_equal,
    changed,
    evaluate,
    loss_and_gradients,
    one_device,
    take_steps,
)

# model, what is changed in it, mesh, ZeRO level, microbatches
CASES = [
    ("gpt", SCANNED, {"data": 8}, "parameters", 4),
    pytest.param(("gpt", SCANNED, {"fsdp": 8}, "optimizer", 4), marks=pytest.mark.slow),
    ("gpt", {}, {"tensor": 8}, "optimizer", 1),
    ("gpt", {"recompute": "full"} | SCANNED, CUBE, "parameters", 1),
    ("gpt with dropout", SCANNED, CUBE, "optimizer", 4),
    (
        *("llama", SCANNED | {"recompute": "all_but_cores", "attention": {"implementation": "xla"}}),
        *({"context": 2, "tensor": 2, "fsdp": 2}, "optimizer", 1),
    ),
    ("gpt of odd width", {}, {"fsdp": 8}, "optimizer", 1),
    ("llama", SCANNED, CUBE, "optimizer", 4),
    # more tensor parts than key/value heads
    ("llama", {"recompute": ["attention", "mlp"]} | SCANNED, {"tensor": 8}, "optimizer", 4),
    pytest.param(
        ("palm", {"recompute": ["mlp", "attention_core"]} | SCANNED, {"fsdp": 2, "tensor": 4}, "optimizer", 1),
        marks=pytest.mark.slow,
    ),
    pytest.param(("palm", SCANNED, {"tensor": 8}, "none", 4), marks=pytest.mark.slow),
    # cut as experts would have it too
    ("llama", SCANNED, {"data": 2, "tensor": 4, "expert": 4, "expert_tensor": 2}, "optimizer", 4),
    # nothing as it usually lies: neighbours are replicas, and the parts of tensor are farthest apart
    ("llama", SCANNED, CUBE | {"order": ("tensor", "fsdp", "data", "context", "pipe")}, "optimizer", 1),
]


def case_name(case) -> str:
    name, changes, mesh, zero, microbatches = case
    words = [name, *map(str, changes.values()), *(f"{axis} {size}" for axis, size in mesh.items())]
    return "-".join([*words, f"zero {zero}", f"microbatches {microbatches}"])


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_loss_and_every_gradient_equal_one_device(case):
    name, changes, mesh, zero, microbatches = case
    model = changed(MODELS[name], **changes)
    result, expected = loss_and_gradients(model, mesh, zero, microbatches), one_device(name)
    assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert_equal(result.gradients, expected.gradients)


# model, mesh, ZeRO level, microbatches, context
REFINED = [
    ("gpt", {"data": 8, "expert": 2}, "none", 2, {}),
    ("llama", {"data": 2, "tensor": 4, "expert": 4, "expert_tensor": 2}, "optimizer", 1, {}),
    ("gpt of odd width", {"data": 4, "tensor": 2, "expert": 4}, "parameters", 1, {}),
    ("gpt", {"pipe": 2, "data": 4, "expert": 2}, "optimizer", 4, {}),
    ("gemma", {"data": 2, "context": 4, "expert": 2}, "optimizer", 1, {"method": "ring"}),
    ("gemma", {"data": 2, "context": 4, "expert": 2}, "optimizer", 1, {"method": "all_to_all"}),
    ("gemma", {"data": 2, "context": 4, "expert": 2}, "optimizer", 1, {"method": "hierarchical", "inner": 2}),
]


@pytest.mark.slow
@pytest.mark.usual_emitters
@pytest.mark.parametrize(("name", "mesh", "zero", "microbatches", "context"), REFINED, ids=str)
def test_a_mesh_refined_for_experts_computes_the_same_bits(name, mesh, zero, microbatches, context):
    model, context = changed(MODELS[name], **SCANNED), ContextConfig(**context)
    refined, plain = (
        loss_and_gradients(model, {flag: mesh.get(flag, 1) for flag in flags}, zero, microbatches, context=context)
        for flags in ((*FLAGS, *mesh), FLAGS)
    )
    assert refined.loss == plain.loss
    assert refined.gradients.keys() == plain.gradients.keys()
    assert all(np.array_equal(refined.gradients[name], plain.gradients[name]) for name in plain.gradients)


SMALL = changed(GPT, num_layers=1)


@functools.cache
def one_device_steps(scales: tuple[float, ...], precision: str) -> Steps:
    return take_steps(SMALL, ONE_DEVICE, "none", scales, precision=precision)


@pytest.mark.parametrize(
    "zero", [*(pytest.param(zero, marks=pytest.mark.slow) for zero in ("none", "optimizer")), "parameters"]
)
def test_whole_steps_equal_one_device(zero):
    expected = one_device_steps((0, 0), "fp32")
    result = take_steps(SMALL, CUBE, zero, (0, 0), microbatches=2, precision="fp32")
    assert_steps_equal(result, expected)


@pytest.mark.slow
def test_no_tracer_outlives_a_step():
    with jax.checking_leaks():
        steps = take_steps(SMALL, CUBE, "parameters", (0,), microbatches=2, precision="fp32")
    assert math.isfinite(steps.metrics[0]["loss"])


def test_fp16_steps_equal_one_device_and_an_overflow_changes_only_the_scale():
    scales = (1024.0, 2.0**40, 0, 1024.0)
    loss_scale = LossScaleConfig(hysteresis=2)
    expected = one_device_steps((1024.0, 1024.0), "fp16")
    result = take_steps(SMALL, CUBE, "optimizer", scales, microbatches=2, precision="fp16", loss_scale=loss_scale)
    assert [math.isfinite(numbers["gradient_norm"]) for numbers in result.metrics] == [True, False, False, True]
    for after in (2, 3):
        for part in ("params", "optimizer"):
            skipped, done = (jax.tree.leaves(getattr(result.states[number], part)) for number in (after, 1))
            assert all(map(np.array_equal, skipped, done))
    assert [numbers["skipped_steps"] for numbers in result.metrics] == [0, 1, 2, 2]
    # the second overflow in a row uses up the hysteresis
    assert [float(state.loss_scale.scale) for state in result.states[1:4]] == [1024.0, 2.0**40, 2.0**39]
    assert [int(state.step) for state in result.states] == [0, 1, 2, 3, 4]
    # the loss is reported unscaled; ten bits of mantissa decide how equal the rest can be
    for numbers, numbers_there in zip((result.metrics[0], result.metrics[3]), expected.metrics, strict=True):
        assert numbers["loss"] == pytest.approx(numbers_there["loss"], rel=2e-3)
        assert numbers["gradient_norm"] == pytest.approx(numbers_there["gradient_norm"], rel=5e-3)
        # a skipped step is none for the schedule, neither in what is applied nor in what is reported
        assert numbers["learning_rate"] == pytest.approx(numbers_there["learning_rate"])
    assert_equal(result.params, expected.params, 5e-3)


def test_fp16_is_close_to_fp32():
    half, single = one_device_steps((1024.0, 1024.0), "fp16"), one_device_steps((0, 0), "fp32")
    assert half.metrics[0]["loss"] == pytest.approx(single.metrics[0]["loss"], rel=2e-3)
    assert half.metrics[0]["gradient_norm"] == pytest.approx(single.metrics[0]["gradient_norm"], rel=5e-3)


def test_evaluation_equals_training_loss_without_dropout():
    nll = evaluate(changed(MODELS["gpt with dropout"], **SCANNED), CUBE, microbatches=4)
    assert nll == pytest.approx(one_device("gpt").loss, rel=TOLERANCE)

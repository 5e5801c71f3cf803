"""The central promise: loss, every gradient and every update are those of one device, on every mesh.

One-device references take the batch whole, scan their layers, and are shared between the cases of a model. What one
device computes is held against plain JAX in `tests/models/test_decoder.py`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.models.config import ModelConfig
from jaxtron.models.decoder import Decoder
from jaxtron.optim import LossScaleConfig, OptimizerConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.partition import partition
from jaxtron.pipeline.schedules import make_schedule
from jaxtron.sharding import Blueprint, MeshConfig, ShardingConfig, blueprint, build_mesh, current, make_rules, use
from jaxtron.sharding.parameters import shardings
from jaxtron.train.config import TrainConfig
from jaxtron.train.step import DTYPES, Batch, Trainer, TrainState, batch_sharding

ROWS, LENGTH, VOCAB = 32, 16, 60
TOLERANCE = 1e-5
# A key bias adds the same score to all keys of a query, which softmax ignores: its gradient is zero but for rounding,
# and rounding is all that a comparison relative to itself would see. So no gradient counts as smaller than this part
# of the norm of all gradients.
FLOOR = 1e-3


def changed(model: ModelConfig, **changes) -> ModelConfig:
    return ModelConfig(**{**model.model_dump(exclude_unset=True), **changes})


GPT = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=8,
    vocab_size=VOCAB,
    vocab_multiple=64,
    max_positions=LENGTH,
)
MODELS = {
    "gpt": GPT,
    "gpt with dropout": changed(GPT, dropout=0.1, attention_dropout=0.2),
    # an odd width: batch axes move to another dimension of each matrix, often one that tensor splits already
    "gpt of odd width": changed(GPT, num_layers=1, hidden_size=35, head_dim=4, mlp_size=64),
    "llama": ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=48,
        vocab_size=VOCAB,
        vocab_multiple=64,
        activation="swiglu",
        norm="rms_norm",
        bias=False,
        position="rotary",
        tied_head=False,
        z_loss=0.01,
    ),
    "palm": ModelConfig(
        pattern="(*-)",
        num_layers=2,
        hidden_size=32,
        num_heads=8,
        num_kv_heads=1,
        # a norm over fewer channels now and then divides by next to nothing, and rounding passes the tolerance
        head_dim=8,
        vocab_size=VOCAB,
        vocab_multiple=64,
        activation="squared_relu",
        norm="layer_norm_1p",
        embedding_norm=True,
        qk_norm=True,
        position="alibi",
        attention_dropout=0.2,
    ),
}
ONE_DEVICE, CUBE = {"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
SCANNED = {"unroll": 1}
# Partitioning and collectives are what these tests are about, not machine code: half of the time to compile.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Result(NamedTuple):
    loss: float
    gradients: dict[str, np.ndarray]


def make_batch() -> Batch:
    """Rows with ever fewer tokens and the last five with none: devices and microbatches differ in their counts."""
    generator = np.random.default_rng(0)
    tokens, targets = generator.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    weights = generator.random((ROWS, LENGTH)) > np.arange(ROWS)[:, None] / (ROWS - 5)
    assert weights[0].all() and not weights[-5:].any()
    return Batch(tokens, targets, weights.astype(np.float32))


def rules_for(mesh: dict[str, int], zero: str = "optimizer"):
    devices = jax.devices()[: math.prod(mesh.values())]
    return make_rules(build_mesh(MeshConfig(**{"data": 1, **mesh}), devices), ShardingConfig(zero=zero))


def make_trainer(
    model: ModelConfig,
    optimizer: OptimizerConfig | None = None,
    pipeline: PipelineConfig = PipelineConfig(),  # noqa: B008 frozen
    **train,
) -> Trainer:
    config = TrainConfig(**{"global_batch": ROWS, "precision": "fp32", **train})
    table = make_schedule(pipeline.schedule, current().mesh.shape["pipe"], config.microbatches, pipeline.chunks)
    stages = partition(model.layout.repeats, table, pipeline)
    plan = blueprint(lambda rngs: Decoder(model, dtype=DTYPES[config.precision], partition=stages, rngs=rngs))
    return Trainer(plan, model, config, optimizer or OptimizerConfig(), pipeline, stages, seed=3)


def make_params(plan: Blueprint):
    """Values for every parameter, none of them special: also biases that are not 0 and scales that are not 1."""
    generator = np.random.default_rng(1)
    values = jax.tree.map(lambda leaf: 0.2 * generator.standard_normal(leaf.shape, np.float32), plan.shapes)
    values = jax.tree.map(lambda leaf, role: leaf + 1 if role == "scale" else leaf, values, plan.roles)
    return jax.device_put(values, shardings(plan.specs))


def by_name(tree) -> dict[str, np.ndarray]:
    """Leaves on the host, named by their place in the tree."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def loss_and_gradients(model: ModelConfig, mesh: dict[str, int], zero: str, microbatches: int) -> Result:
    with use(rules_for(mesh, zero)):
        trainer = make_trainer(model, microbatches=microbatches)
        params = make_params(trainer.blueprint)
        batch = jax.device_put(make_batch(), batch_sharding())
        run = jax.jit(trainer.loss_and_gradients, compiler_options=QUICK)
        loss, gradients = run(params, batch, jnp.int32(5), jnp.float32(1.0))
        for gradient, param in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True):
            assert gradient.sharding == param.sharding
        return Result(float(loss), by_name(gradients))


@functools.cache
def one_device(name: str) -> Result:
    return loss_and_gradients(changed(MODELS[name], **SCANNED), ONE_DEVICE, "none", 1)


def assert_equal(result: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """Largest difference of every array, relative to its largest entry (and to `FLOOR` of the norm of all)."""
    assert result.keys() == expected.keys()
    norm = math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in expected.values()))
    errors = {
        name: np.abs(result[name] - expected[name]).max() / max(np.abs(expected[name]).max(), FLOOR * norm)
        for name in expected
    }
    wrong = {name: float(error) for name, error in errors.items() if not error < tolerance}
    assert not wrong


# model, what is changed in it, mesh, ZeRO level, microbatches
CASES = [
    ("gpt", {}, {"data": 8}, "none", 1),
    ("gpt", SCANNED, {"data": 8}, "optimizer", 4),
    ("gpt", SCANNED, {"data": 8}, "parameters", 4),
    ("gpt", SCANNED, {"fsdp": 8}, "optimizer", 4),
    ("gpt", {}, {"tensor": 8}, "optimizer", 1),
    ("gpt", {"recompute": "selective"}, CUBE, "none", 1),
    ("gpt", {"recompute": "full"} | SCANNED, CUBE, "parameters", 1),
    ("gpt with dropout", SCANNED, CUBE, "optimizer", 4),
    ("gpt with dropout", {"recompute": "full"} | SCANNED, {"data": 4, "tensor": 2}, "none", 1),
    ("gpt of odd width", {}, {"fsdp": 8}, "optimizer", 1),
    ("llama", {}, {"fsdp": 8}, "optimizer", 1),
    ("llama", SCANNED, CUBE, "optimizer", 4),
    # more tensor parts than key/value heads
    ("llama", {"recompute": ["attention", "mlp"]} | SCANNED, {"tensor": 8}, "optimizer", 4),
    ("palm", {"recompute": "selective"}, {"data": 8}, "parameters", 1),
    ("palm", {"recompute": ["norm", "attention_core"]} | SCANNED, {"fsdp": 2, "tensor": 4}, "optimizer", 1),
    ("palm", SCANNED, {"tensor": 8}, "none", 4),
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


SMALL = changed(GPT, num_layers=1)
# without a large epsilon the first update is the sign of a gradient, which rounding decides where that is nearly zero
ADAMW = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, schedule="linear", decay_steps=10, clip_norm=0.5)


def placed_state(trainer: Trainer) -> TrainState:
    """The state before the first step, with parameters from `make_params`."""
    params = make_params(trainer.blueprint)
    return jax.jit(trainer._around)(params)


class Steps(NamedTuple):
    metrics: list[dict[str, float]]
    params: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    states: list[TrainState]


def take_steps(mesh: dict[str, int], zero: str, scales: tuple[float, ...], **train) -> Steps:
    """One step for each of the loss scales put in (0: left as it is), on one batch."""
    with use(rules_for(mesh, zero)):
        trainer = make_trainer(SMALL, ADAMW, **train)
        state = placed_state(trainer)
        batch = jax.device_put(make_batch(), batch_sharding())
        run = jax.jit(trainer.step, compiler_options=QUICK)
        states, metrics = [state], []
        for scale in scales:
            if scale:
                loss_scale = dataclasses.replace(state.loss_scale, scale=jnp.float32(scale))
                state = dataclasses.replace(state, loss_scale=loss_scale)
            state, numbers = run(state, batch)
            states.append(state)
            metrics.append({name: float(number) for name, number in numbers.items()})
        for leaf, first in zip(jax.tree.leaves(state), jax.tree.leaves(states[0]), strict=True):
            # a step that moved its state would compile again, or refuse to
            assert leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)
        return Steps(metrics, by_name(state.params), by_name(state.optimizer), states)


@functools.cache
def one_device_steps(scales: tuple[float, ...], precision: str) -> Steps:
    return take_steps(ONE_DEVICE, "none", scales, precision=precision)


@pytest.mark.parametrize("zero", ["none", "optimizer", "parameters"])
def test_whole_steps_equal_one_device(zero):
    expected = one_device_steps((0, 0), "fp32")
    result = take_steps(CUBE, zero, (0, 0), microbatches=2, precision="fp32")
    # clipping is at work, and the second step learns from the first
    assert expected.metrics[0]["gradient_norm"] > ADAMW.clip_norm
    assert expected.metrics[1]["loss"] < expected.metrics[0]["loss"]
    for numbers, numbers_there in zip(result.metrics, expected.metrics, strict=True):
        assert numbers == pytest.approx(numbers_there, rel=TOLERANCE)
    assert_equal(result.params, expected.params)
    assert_equal(result.optimizer, expected.optimizer)


def test_fp16_steps_equal_one_device_and_an_overflow_changes_only_the_scale():
    scales = (1024.0, 2.0**40, 0, 1024.0)
    loss_scale = LossScaleConfig(hysteresis=2)
    expected = one_device_steps((1024.0, 1024.0), "fp16")
    result = take_steps(CUBE, "optimizer", scales, microbatches=2, precision="fp16", loss_scale=loss_scale)
    assert [math.isfinite(numbers["gradient_norm"]) for numbers in result.metrics] == [True, False, False, True]
    for after in (2, 3):
        for part in ("params", "optimizer"):
            skipped, kept = (by_name(getattr(result.states[number], part)) for number in (after, 1))
            assert all(np.array_equal(skipped[name], kept[name]) for name in kept)
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
    with use(rules_for(CUBE)):
        trainer = make_trainer(changed(MODELS["gpt with dropout"], **SCANNED))
        batch = jax.device_put(make_batch(), batch_sharding())
        run = jax.jit(trainer.evaluate, compiler_options=QUICK)
        nll, count = run(make_params(trainer.blueprint), batch)
    assert count == batch.weights.sum()
    assert float(nll / count) == pytest.approx(one_device("gpt").loss, rel=TOLERANCE)

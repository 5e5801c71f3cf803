"""What the equivalence tests beside it share: small models, one batch, and runs of it on one device or many.

Parameters and batch are the same global values on every mesh and partition; what comes back is in the model's order.
One-device references take the batch whole, scan their layers, and are shared between the cases of a model.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.checkpoint.names import parts
from jaxtron.data.batch import TokenBatch
from jaxtron.data.config import DataConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.optim.config import OptimizerConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.layer_slots import arrange, restore
from jaxtron.pipeline.partition import Partition
from jaxtron.run.configuration import Configuration, TrainConfig
from jaxtron.run.session import make_trainer as make_trainer_of
from jaxtron.run.state import TrainState
from jaxtron.run.step import Trainer, batch_sharding
from jaxtron.sharding.config import ContextConfig, MeshConfig, ShardingConfig
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.parameters import shardings
from jaxtron.sharding.rules import current, make_rules, use

ROWS, LENGTH, VOCAB = 32, 16, 60
TOLERANCE = 1e-5
# A key bias adds the same score to all keys of a query, which softmax ignores: its gradient is zero but for rounding,
# and rounding is all that a comparison relative to itself would see. So no gradient counts as smaller than this part
# of the norm of all gradients.
FLOOR = 1e-3
NONE_ADDED: Mapping[str, Any] = MappingProxyType({})


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
# all that scores can be made of: layers with and without a window, capped scores, sinks
MODELS["gemma"] = changed(
    MODELS["llama"],
    pattern="W-*-",
    num_kv_heads=4,
    num_layers=1,
    attention={"window": 5, "soft_cap": 2.0, "scale": 0.5, "sinks": True, "implementation": "xla"},
)
ONE_DEVICE, CUBE = {"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
SCANNED = {"unroll": 1}


ONE_STAGE = PipelineConfig()


class Result(NamedTuple):
    loss: float
    gradients: dict[str, np.ndarray]


def make_batch(rows: int = ROWS, packed: bool = False, length: int = LENGTH, mean: float = 5) -> TokenBatch:
    """Rows with ever fewer tokens and the last five with none: devices and microbatches differ in their counts.

    `packed`: each row is several documents, cut anywhere, with so many tokens in the mean.
    """
    generator = np.random.default_rng(0)
    tokens, targets = generator.integers(0, VOCAB, (2, rows, length), dtype=np.int32)
    # a row that begins with a token twice has two positions that are alike: which of them an expert takes is rounding's
    tokens[:, 1] = np.where(tokens[:, 1] == tokens[:, 0], (tokens[:, 1] + 1) % VOCAB, tokens[:, 1])
    weights = generator.random((rows, length)) > np.arange(rows)[:, None] / (rows - 5)
    assert weights[0].all() and not weights[-5:].any()
    batch = TokenBatch(tokens, targets, weights.astype(np.float32))
    if not packed:
        return batch
    segments = np.cumsum(generator.random((rows, length)) < 1 / mean, 1, dtype=np.int32)
    starts = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1), np.arange(length), 0), 1)
    return dataclasses.replace(batch, positions=(np.arange(length) - starts).astype(np.int32), segments=segments)


def rules_for(
    mesh: dict[str, Any],
    zero: str = "optimizer",
    context: ContextConfig | None = None,
    overlap_tensor: bool | None = None,
):
    # experts' flags are another view of the same devices, and `order` is none
    devices = jax.devices()[: math.prod(mesh.get(flag, 1) for flag in FLAGS)]
    sharding = ShardingConfig(zero=zero, overlap_tensor=overlap_tensor)
    return make_rules(build_mesh(MeshConfig(**{"data": 1, **mesh}), devices), sharding, context)


def make_trainer(
    model: ModelConfig,
    optimizer: OptimizerConfig | None = None,
    pipeline: PipelineConfig = ONE_STAGE,
    length: int = LENGTH,
    **train,
) -> Trainer:
    config = TrainConfig(**{"global_batch": ROWS, "precision": "fp32", **train})
    whole = Configuration(
        model=model,
        train=config,
        pipeline=pipeline,
        optimizer=optimizer or OptimizerConfig(),
        mesh=MeshConfig(**current().sizes),
        data=DataConfig(sequence_length=length),
        seed=3,
    )
    return make_trainer_of(whole)


def make_params(trainer: Trainer, biases: Mapping[str, Any] = NONE_ADDED):
    """Values for every parameter, none of them special: also biases that are not 0 and scales that are not 1.

    `biases` are added to the parameters that these words name.
    """
    generator, plan = np.random.default_rng(1), trainer.blueprint

    def values(path, leaf) -> np.ndarray:
        stages = stack_of(path, trainer)
        shape = leaf.shape if stages is None else (stages.num_layers, *leaf.shape[1:])
        value = 0.2 * generator.standard_normal(shape, np.float32) + (leaf.role == "scale")
        value += np.float32(biases.get(parts(path)[-1], 0.0))
        return value if stages is None else np.asarray(arrange(stages, value))

    made = plan.at_rest(jax.tree.map_with_path(values, plan.parameters))
    return jax.device_put(made, shardings(plan.parameters))


def stack_of(path, trainer: Trainer) -> Partition | None:
    """The partition of the stack that this leaf of parameters, gradients or moments is in."""
    name = "/".join(parts(path))
    return next((stack for place, stack in trainer.partitions.items() if f"/{place}/" in f"/{name}/"), None)


def by_name(tree, trainer: Trainer) -> dict[str, np.ndarray]:
    """Leaves on the host, layers in the model's order and without padding, named by their place in the tree."""
    specs = jax.tree.leaves_with_path(trainer.blueprint.parameters)
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name, value = jax.tree_util.keystr(path), np.asarray(leaf)
        for end, spec in specs:
            if name.endswith(jax.tree_util.keystr(end)):
                own = value[tuple(map(slice, spec.shape))]
                assert np.abs(value).sum() == pytest.approx(np.abs(own).sum()), "padding is not zero"
                value = own
        if (stages := stack_of(path, trainer)) is not None:
            assert not value[np.asarray(stages.slot_layers) < 0].any(), "an empty row is not zero"
            value = np.asarray(restore(stages, value))
        leaves[name] = value
    return leaves


def loss_and_gradients(
    model: ModelConfig,
    mesh: dict[str, Any],
    zero: str,
    microbatches: int,
    pipeline: PipelineConfig = ONE_STAGE,
    rows: int = ROWS,
    context: ContextConfig | None = None,
    packed: bool = False,
    length: int = LENGTH,
    mean: float = 5,
    biases: Mapping[str, Any] = NONE_ADDED,
    overlap_tensor: bool | None = None,
) -> Result:
    """`length` and `mean` as in `make_batch`, `biases` as in `make_params`."""
    with use(rules_for(mesh, zero, context, overlap_tensor)):
        trainer = make_trainer(model, pipeline=pipeline, length=length, microbatches=microbatches, global_batch=rows)
        params = make_params(trainer, biases)
        batch = jax.device_put(make_batch(rows, packed, length, mean), batch_sharding())
        run = jax.jit(trainer.loss_and_gradients)
        everywhere = NamedSharding(current().mesh, PartitionSpec())
        step, scale = jax.device_put((jnp.int32(5), jnp.float32(1.0)), everywhere)
        # nothing is brought to the devices, or among them, unasked
        with jax.transfer_guard("disallow"):
            metrics, gradients = run(params, batch, step, scale)
        for gradient, param in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True):
            assert gradient.sharding == param.sharding
        return Result(float(metrics["loss"]), by_name(gradients, trainer))


@functools.cache
def one_device(name: str, num_layers: int | None = None, rows: int = ROWS) -> Result:
    depth = {} if num_layers is None else {"num_layers": num_layers}
    return loss_and_gradients(changed(MODELS[name], **SCANNED, **depth), ONE_DEVICE, "none", 1, rows=rows)


def evaluate(
    model: ModelConfig,
    mesh: dict[str, int],
    pipeline: PipelineConfig = ONE_STAGE,
    rows: int = ROWS,
    microbatches: int = 1,
) -> float:
    """Mean negative log-likelihood of the batch by the step of validation."""
    with use(rules_for(mesh)):
        trainer = make_trainer(model, pipeline=pipeline, global_batch=rows, microbatches=microbatches)
        batch = jax.device_put(make_batch(rows), batch_sharding())
        run = jax.jit(trainer.evaluate)
        params = make_params(trainer)
        with jax.transfer_guard("disallow"):
            sums, counts = run(params, batch)
    assert counts == {"tokens": batch.weights.sum()}
    return float(sums["loss"] / counts["tokens"])


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


# without a large epsilon the first update is the sign of a gradient, which rounding decides where that is nearly zero
ADAMW = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, schedule="linear", decay_steps=10, clip_norm=0.5)


class Steps(NamedTuple):
    metrics: list[dict[str, float]]
    params: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    states: list[TrainState]


def take_steps(
    model: ModelConfig,
    mesh: dict[str, int],
    zero: str,
    scales: tuple[float, ...],
    pipeline: PipelineConfig = ONE_STAGE,
    **train,
) -> Steps:
    """One step for each of the loss scales put in (0: left as it is), on one batch."""
    with use(rules_for(mesh, zero)):
        trainer = make_trainer(model, ADAMW, pipeline, **train)
        state = jax.jit(trainer._around)(make_params(trainer))
        batch = jax.device_put(make_batch(trainer.config.global_batch), batch_sharding())
        run = jax.jit(trainer.step)
        states, metrics = [state], []
        for scale in scales:
            if scale:
                loss_scale = dataclasses.replace(state.loss_scale, scale=jnp.float32(scale))
                state = dataclasses.replace(state, loss_scale=loss_scale)
            with jax.transfer_guard("disallow"):
                state, numbers = run(state, batch)
            states.append(state)
            metrics.append({name: float(number) for name, number in numbers.items()})
        for leaf, first in zip(jax.tree.leaves(state), jax.tree.leaves(states[0]), strict=True):
            # a step that moved its state would compile again, or refuse to
            assert leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)
        return Steps(metrics, by_name(state.params, trainer), by_name(state.optimizer, trainer), states)


def assert_steps_equal(result: Steps, expected: Steps) -> None:
    """Metrics, parameters and optimizer after two steps, of which clipping made the first smaller."""
    assert expected.metrics[0]["gradient_norm"] > ADAMW.clip_norm
    # the second step learns from the first
    assert expected.metrics[1]["loss"] < expected.metrics[0]["loss"]
    for numbers, numbers_there in zip(result.metrics, expected.metrics, strict=True):
        assert numbers == pytest.approx(numbers_there, rel=TOLERANCE)
    assert_equal(result.params, expected.params)
    assert_equal(result.optimizer, expected.optimizer)

"""Loss, gradients and updates are those of one device where ZeRO divides no dimension too: padding is no part."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxtron.checkpoint import record as records
from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.layer_order import layer_order
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import step_path
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.run.session import placed
from jaxtron.sharding.rules import use
from tests.support.equivalence import (
    ADAMW,
    GPT,
    MODELS,
    ONE_DEVICE,
    SCANNED,
    TOLERANCE,
    Steps,
    assert_equal,
    assert_steps_equal,
    by_name,
    changed,
    loss_and_gradients,
    make_params,
    make_trainer,
    one_device,
    rules_for,
    take_steps,
)

# shared out evenly by 2, 3, 5 and 6
ROWS = 30
SMALL = changed(GPT, num_layers=1)
SLOW = pytest.mark.slow


@functools.cache
def one_device_steps() -> Steps:
    return take_steps(SMALL, ONE_DEVICE, "none", (0, 0), global_batch=ROWS)


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        ({"data": 3, "tensor": 2}, "optimizer"),
        pytest.param({"fsdp": 5}, "none", marks=SLOW),
        pytest.param({"data": 3, "fsdp": 2}, "parameters", marks=SLOW),
        pytest.param({"data": 6}, "optimizer", marks=SLOW),
    ],
    ids=str,
)
def test_whole_steps_equal_one_device(mesh, zero):
    result = take_steps(SMALL, mesh, zero, (0, 0), global_batch=ROWS)
    assert_steps_equal(result, one_device_steps())


@pytest.mark.parametrize(
    ("name", "mesh", "zero", "microbatches", "schedule"),
    [
        pytest.param("llama", {"data": 3, "fsdp": 2}, "optimizer", 5, "1f1b", marks=SLOW),
        pytest.param("llama", {"fsdp": 3, "tensor": 2}, "none", 2, "1f1b", marks=SLOW),
        pytest.param("palm", {"fsdp": 5}, "optimizer", 2, "1f1b", marks=SLOW),
        pytest.param("llama", {"data": 3, "context": 2}, "parameters", 1, "1f1b", marks=SLOW),
        pytest.param("gpt", {"data": 3, "pipe": 2}, "optimizer", 5, "zero_bubble", marks=SLOW),
        pytest.param("gpt of odd width", {"data": 3, "context": 2}, "optimizer", 2, "1f1b", marks=SLOW),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_one_device(name, mesh, zero, microbatches, schedule):
    pipeline = PipelineConfig(schedule=schedule)
    result = loss_and_gradients(changed(MODELS[name], **SCANNED), mesh, zero, microbatches, pipeline, rows=ROWS)
    expected = one_device(name, rows=ROWS)
    assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert_equal(result.gradients, expected.gradients)


def test_a_checkpoint_does_not_know_the_mesh(tmp_path: Path):
    """Parameters and moments, written where 6 divides nothing, are read where 4 divides all; and on uneven stages.

    Three stages share the embedding, whose width they do not divide.
    """
    model = changed(GPT, num_layers=3)
    meshes = {"data": 6}, {"data": 4}, {"pipe": 2, "data": 3}, {"data": 6}, {"pipe": 3}, {"data": 4}
    stages = {2: (2, 1), 3: (1, 1, 1)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    expected, on_disk = {}, []
    for step, mesh in enumerate(meshes):
        with use(rules_for(mesh)) as rules:
            pipeline = PipelineConfig(stage_layers=stages.get(mesh.get("pipe", 1)))
            microbatches = 2 if "pipe" in mesh else 1
            trainer = make_trainer(model, ADAMW, pipeline, global_batch=60, microbatches=microbatches)
            order, abstract = layer_order(trainer.partitions, trainer.blueprint), trainer.abstract_state()
            padded = [leaf.shape for leaf in jax.tree.leaves(abstract)]
            abstract = placed(abstract, rules.mesh)
            if step:
                restored = checkpoints.restore(order.abstract(abstract), on_disk=order.on_disk(abstract))
                assert restored is not None and restored.step == step - 1
                state = order.in_stage_order(restored.state, abstract)
                found = by_name(state, trainer)
                assert {name: array.tobytes() for name, array in found.items()} == expected
            else:
                # moments of an update by the parameters themselves
                params = make_params(trainer)
                state = jax.jit(trainer._around)(params)
                update = jax.jit(trainer._rule().update)
                state = replace(state, optimizer=update(params, state.optimizer, params)[1])
                expected = {name: array.tobytes() for name, array in by_name(state, trainer).items()}
            assert [leaf.shape for leaf in jax.tree.leaves(state)] == padded
            checkpoints.save(step, order.in_model_order(state), {}, order.on_disk(state))
            checkpoints.wait()
            on_disk.append(records.read(step_path(checkpoints.directory, step)).arrays)
    # the same arrays of the same shapes, whoever wrote them
    assert all(arrays == on_disk[0] for arrays in on_disk)
    checkpoints.close()

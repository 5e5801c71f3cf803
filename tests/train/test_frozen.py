"""Frozen parameters: the others train as they would beside trained ones, and nothing is computed or kept for these."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.checkpoint.restore import restore_part
from jaxtron.config import load
from jaxtron.evaluate.__main__ import main as evaluate
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from jaxtron.run.step import batch_sharding
from jaxtron.sharding.rules import use
from tests.support.command_runs import run_here, small
from tests.support.commands import run_main
from tests.support.equivalence import (
    GPT,
    ONE_STAGE,
    TOLERANCE,
    assert_equal,
    by_name,
    changed,
    make_batch,
    make_params,
    make_trainer,
    one_device,
    rules_for,
    take_steps,
)

# the embedding, which is the head too, a matrix and a norm of each layer; in model order whatever the mesh
SOME = ("!embedding.table", "!*mlp.up.kernel", "!stack.*norm.scale")
NORMS_AND_BIASES = ("*norm*", "*.bias")
FINAL = ("final_norm.*",)
SMALL = changed(GPT, num_layers=1)


def gradients_of(trainable, mesh, zero="optimizer", pipeline=ONE_STAGE, precision="fp32", model=GPT, **train):
    """Loss and gradients of a step in which these are trained, on this mesh."""
    with use(rules_for(mesh, zero)):
        trainer = make_trainer(model, pipeline=pipeline, precision=precision, trainable=trainable, **train)
        batch = jax.device_put(make_batch(), batch_sharding())
        scale = jnp.float32(2.0**10 if precision == "fp16" else 1.0)
        run = jax.jit(trainer.loss_and_gradients)
        metrics, gradients = run(make_params(trainer), batch, jnp.int32(5), scale)
        trained = trainer.blueprint.of("trained", trainer.blueprint.abstract)
        assert jax.tree.structure(gradients) == jax.tree.structure(trained)
        for gradient, param in zip(jax.tree.leaves(gradients), jax.tree.leaves(trained), strict=True):
            assert gradient.sharding == param.sharding and gradient.dtype == jnp.float32
        return float(metrics["loss"]), by_name(gradients, trainer)


@pytest.mark.parametrize(
    ("mesh", "zero", "schedule", "trainable"),
    [
        ({"data": 2, "pipe": 2}, "none", "zero_bubble", NORMS_AND_BIASES),
        pytest.param({"data": 2, "tensor": 2}, "optimizer", "1f1b", SOME, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "data": 2}, "parameters", "1f1b", SOME, marks=pytest.mark.slow),
        pytest.param({"pipe": 2, "tensor": 2}, "optimizer", "zero_bubble", FINAL, marks=pytest.mark.slow),
        pytest.param({"context": 2, "fsdp": 2}, "optimizer", "1f1b", NORMS_AND_BIASES, marks=pytest.mark.slow),
        pytest.param({"context": 2, "data": 2}, "parameters", "1f1b", SOME, marks=pytest.mark.slow),
        pytest.param({"pipe": 2, "fsdp": 2}, "parameters", "zero_bubble", SOME, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_others_gradients_are_those_of_the_whole_model(mesh, zero, schedule, trainable):
    expected = one_device("gpt")
    pipeline = PipelineConfig(schedule=schedule) if "pipe" in mesh else ONE_STAGE
    loss, gradients = gradients_of(trainable, mesh, zero, pipeline, microbatches=4)
    assert loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert 0 < len(gradients) < len(expected.gradients)
    # beside those of the others, whose norm says what is large
    assert_equal({**expected.gradients, **gradients}, expected.gradients)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero"), [("bf16", "optimizer"), ("fp16", "parameters")])
def test_weights_at_rest_in_the_steps_type_are_those_it_would_have_cast(precision, zero):
    mesh = {"fsdp": 2, "data": 2}
    loss, expected = gradients_of(("*",), mesh, zero, precision=precision, model=SMALL)
    same, gradients = gradients_of(SOME, mesh, zero, precision=precision, model=SMALL)
    assert same == loss and 0 < len(gradients) < len(expected)
    # rounding to 16 bits is where XLA puts it, which may be another place without the gradients beside it
    assert_equal(gradients, {name: expected[name] for name in gradients}, 1e-3)


@pytest.mark.parametrize(
    ("precision", "scales"), [pytest.param("bf16", (0, 0), marks=pytest.mark.slow), ("fp16", (0, 2.0**40))]
)
def test_a_step_leaves_frozen_parameters_alone(precision, scales):
    """No decay, no moments; the second step of fp16 overflows and is skipped."""
    found = take_steps(SMALL, {"data": 2}, "optimizer", scales, precision=precision, trainable=SOME)
    first, *_, last = found.states
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(first.frozen)]
    assert kept and {str(leaf.dtype) for leaf in kept} == {
        {"bf16": "bfloat16", "fp16": "float16"}[precision],
        "float32",
    }
    for before, after in zip(kept, jax.tree.leaves(last.frozen), strict=True):
        np.testing.assert_array_equal(before, np.asarray(after))
    for before, after in zip(jax.tree.leaves(first.params), jax.tree.leaves(found.states[1].params), strict=True):
        assert (np.asarray(before) != np.asarray(after)).any()
    assert len(jax.tree.leaves(last.optimizer)) == 2 * len(jax.tree.leaves(last.params)) + 1
    skipped = int(precision == "fp16")
    assert int(last.step) == 2 and int(last.updates) == 2 - skipped
    if skipped:
        assert found.metrics[1]["skipped_steps"] == 1
        for before, after in zip(jax.tree.leaves(found.states[1].params), jax.tree.leaves(last.params), strict=True):
            np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.slow
def test_a_run_is_saved_resumed_and_scored(tmp_path: Path):
    """With a vocabulary of bytes; the second step goes on elsewhere, and nothing of what is frozen moves."""
    flags = [*small(tmp_path), "--train.precision", "bf16", "--train.sample_tokens", "0", "--checkpoint.keep", "9"]
    frozen = ["--train.trainable", "!embedding.table", "!*.mlp.*.kernel"]

    def stored(step: int) -> dict[str, np.ndarray]:
        session = make_session(load(Configuration, None, [*flags, *frozen, "--mesh.data", "1"]), jax.devices()[:1])
        with session.use():
            abstract = {"frozen": session.abstract_state().frozen}
            part = restore_part(tmp_path / "run" / "checkpoints", abstract, step=step)
            return {
                jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(part.state)
            }

    ended = run_here(*flags, *frozen, "--train.steps", "1")
    assert ended.code == 0, ended
    meshes = ["--mesh.fsdp", "2", "--mesh.data", "4", "--sharding.zero", "parameters"]
    ended = run_here(*flags, *frozen, "--train.steps", "2", *meshes)
    assert ended.code == 0, ended
    first, second = stored(1), stored(2)
    assert first.keys() == second.keys() and len(first) == 3
    for name, array in first.items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, second[name])
    ended = run_here(*flags, "--train.trainable", "final_norm.*", "--train.steps", "3")
    assert ended.code == 2 and ended.err.count("\n") == 1
    change = "train.trainable [!embedding.table, !*.mlp.*.kernel] -> [final_norm.*]"
    assert f"run was trained with other settings: {change}; give the old ones, or choose another" in ended.err
    # what lies there in bfloat16 is read as float32, and by the next command in that
    text = tmp_path / "text.txt"
    ended = run_main(evaluate, [tmp_path / "run", "--text", text, "--train.precision", "fp32"])
    assert ended.code == 0, ended
    ended = run_here(*flags, *frozen, "--train.steps", "3", "--train.precision", "fp32")
    assert ended.code == 0, ended

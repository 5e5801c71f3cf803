"""Buffers, which a family's rule updates once a step: the same on every mesh, saved, and resumed on another mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.run.configuration import configuration_of
from jaxtron.run.session import make_session, make_trainer
from jaxtron.run.step import batch_sharding
from jaxtron.sharding.rules import use
from tests.support.equivalence import TOLERANCE, assert_equal, by_name, make_params, rules_for
from tests.toy_family.program import DECAY, ToyBatch

FAMILY, LAYERS, ROWS, LENGTH, VOCAB = "tests.toy_family", 4, 8, 16, 60
NAMES = [f"['{stack}']['layers']['mean_square']" for stack in ("decoder", "encoder")]


def make_batch() -> ToyBatch:
    """Rows with ever other counts of tokens, all with a label."""
    generator = np.random.default_rng(0)
    tokens, targets = generator.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    weights = (generator.random((ROWS, LENGTH)) > 0.4).astype(np.float32)
    return ToyBatch(tokens, targets, weights, tokens[:, 0] % 2, np.ones(ROWS, np.float32))


def configuration(mesh: dict[str, int], schedule: str = "1f1b", **train):
    model = {"family": FAMILY, "vocab_size": VOCAB, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
    settings = {"model": model, "mesh": {"data": 1, **mesh}, "data": {"sequence_length": LENGTH}}
    train = {"global_batch": ROWS, "microbatches": 2, "precision": "fp32", **train}
    return configuration_of(FAMILY).model_validate(settings | {"train": train, "pipeline": {"schedule": schedule}})


def steps(mesh: dict[str, int], schedule: str = "1f1b", scales: tuple[float, ...] = (0, 0), **train):
    """What is reported of each step, and the buffers after it; `scales` as in `take_steps`."""
    with use(rules_for(mesh)):
        trainer = make_trainer(configuration(mesh, schedule, **train))
        first = state = jax.jit(trainer._around)(make_params(trainer))
        batch, run = jax.device_put(make_batch(), batch_sharding()), jax.jit(trainer.step)
        found = [({}, by_name(state.buffers, trainer))]
        for scale in scales:
            if scale:
                loss_scale = dataclasses.replace(state.loss_scale, scale=jnp.float32(scale))
                state = dataclasses.replace(state, loss_scale=loss_scale)
            state, metrics = run(state, batch)
            found.append(
                ({name: np.asarray(value) for name, value in metrics.items()}, by_name(state.buffers, trainer))
            )
        for leaf, before in zip(jax.tree.leaves(state), jax.tree.leaves(first), strict=True):
            assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim) and leaf.dtype == before.dtype
        return found


one_device = functools.cache(lambda: steps({}))


def test_a_step_applies_the_rule_to_every_layer():
    (_, before), (metrics, after), (_, last) = one_device()
    assert list(before) == NAMES
    for name, stack in zip(NAMES, ("decoder", "encoder"), strict=True):
        mean = metrics[f"{stack}/layers/squares"] / metrics[f"{stack}/layers/weight"][:, None]
        np.testing.assert_allclose(after[name], before[name] + DECAY * (mean - before[name]), rtol=TOLERANCE)
        # a row for each layer, each its own, and the next step goes on from there
        assert after[name].shape == (LAYERS, 16) and len(np.unique(after[name])) == after[name].size
        assert (last[name] != after[name]).all()


def test_the_forward_reads_them():
    losses = []
    with use(rules_for({})):
        trainer = make_trainer(configuration({}))
        run, params = jax.jit(trainer.evaluate), make_params(trainer)
        for factor in (1.0, 2.0):
            changed = jax.tree.map(
                lambda spec, leaf, factor=factor: leaf * factor if spec.status == "buffer" else leaf,
                trainer.blueprint.parameters,
                params,
            )
            losses.append(float(run(changed, make_batch())[0]["text"]))
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [
        ({"pipe": 2, "context": 2}, "interleaved"),
        ({"data": 2, "tensor": 2}, "1f1b"),
        ({"fsdp": 2, "context": 2}, "1f1b"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_they_are_those_of_one_device(mesh, schedule):
    for (metrics, buffers), (expected, expected_buffers) in zip(steps(mesh, schedule), one_device(), strict=True):
        assert_equal(buffers, expected_buffers)
        assert metrics.keys() == expected.keys()


@pytest.mark.slow
def test_a_skipped_step_leaves_them():
    """The first step of fp16 has a loss scale that fits, the second overflows, the third fits again."""
    _, (_, first), (metrics, skipped), (_, last) = steps({"data": 2}, scales=(8.0, 2.0**60, 8.0), precision="fp16")
    assert metrics["skipped_steps"] == 1 and not np.isfinite(metrics["gradient_norm"])
    for name in NAMES:
        np.testing.assert_array_equal(skipped[name], first[name])
        assert np.isfinite(last[name]).all() and (last[name] != skipped[name]).any()
        # the loss scale, which is in the metrics that weights made, is in none of the means
        assert np.abs(last[name]).max() < 100


def test_a_checkpoint_has_them_in_the_models_order(tmp_path):
    """Saved by stages that have every other layer, read on one device: bit for bit, and once."""
    saved = make_session(configuration({"pipe": 2, "fsdp": 2}, "interleaved"), jax.devices()[:4])
    with saved.use():
        state = jax.jit(saved.trainer._around)(make_params(saved.trainer))
        order, expected = saved.layer_order, by_name(state.buffers, saved.trainer)
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
        checkpoints.save(1, order.in_model_order(state), {}, order.on_disk(state))
        checkpoints.close()
        names = [name for name in order.on_disk(state) if "mean_square" in name]
    assert names == ["buffers.decoder.layers.mean_square", "buffers.encoder.layers.mean_square"]
    read = make_session(configuration({}), jax.devices()[:1])
    with read.use():
        order, abstract = read.layer_order, read.abstract_state()
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        restored = checkpoints.restore(order.abstract(abstract), on_disk=order.on_disk(abstract))
        checkpoints.close()
        assert restored is not None
        found = by_name(order.in_stage_order(restored.state, abstract).buffers, read.trainer)
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def test_they_are_no_parameters_of_an_optimizer():
    session = make_session(configuration({}), jax.devices()[:1])
    with session.use():
        state, blueprint = session.abstract_state(), session.blueprint
        assert blueprint.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
        assert session.config.family.num_parameters(session.config.model, LENGTH) == blueprint.num_parameters
    assert {leaf.size for leaf in jax.tree.leaves(state.buffers)} == {LAYERS * 16}
    assert not any(
        "mean_square" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.optimizer)
    )
    with pytest.raises(ValueError, match="matches no parameter"):
        make_session(configuration({}, trainable=["*mean_square"]), jax.devices()[:1]).abstract_state()

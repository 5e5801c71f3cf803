"""A session: what a configuration becomes on devices, usable without knowing of meshes and rules."""

import jax
import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.data.loader import LocalBatch
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from jaxtron.sharding.rules import current

MODEL = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 32, "vocab_multiple": 32}


def configuration(**sections: dict) -> Configuration:
    train = {"global_batch": 4, "precision": "fp32", "steps": 2} | sections.pop("train", {})
    model = MODEL | sections.pop("model", {})
    return Configuration.model_validate({"model": model, "data": {"sequence_length": 8}, "train": train, **sections})


def test_methods_enter_the_rules_of_their_own_session() -> None:
    meshes = {1: {"data": 1}, 4: {"data": 2, "tensor": 2}}
    sessions = [make_session(configuration(mesh=mesh), jax.devices()[:count]) for count, mesh in meshes.items()]
    tokens = np.random.default_rng(0).integers(32, size=(4, 9), dtype=np.int32)
    arrays = TokenBatch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 8), np.float32))
    losses = []
    # one beside the other, and outside of any rules
    states = [session.initial_state() for session in sessions]
    for session, state in zip(sessions, states, strict=True):
        expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), session.abstract_state().params)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state.params) == expected
        batch = session.batches.globalize(LocalBatch(0, 4, 4, session.batches.local_rows(4), arrays))
        state, metrics = session.step(state, batch)
        assert int(state.step) == 1
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(UserError, match="no mesh here"):
        current()


def test_one_that_evaluates_does_not_look_at_the_batches_of_the_training() -> None:
    config = configuration(
        mesh={"data": 2, "pipe": 2}, train={"global_batch": 21, "microbatches": 7}, model={"num_layers": 2}
    )
    with pytest.raises(UserError, match="train.global_batch 21 is not a multiple of mesh.data 2"):
        make_session(config, jax.devices()[:4])
    session = make_session(config, jax.devices()[:4], trains=False)
    assert session.trainer.config.global_batch == 21
    # what concerns the model is looked at
    with pytest.raises(UserError, match="model.num_heads 2 is not a multiple of mesh.tensor 4"):
        make_session(configuration(mesh={"data": 1, "tensor": 4}), jax.devices()[:4], trains=False)
    with pytest.raises(UserError, match="too few for mesh.pipe 4"):
        make_session(configuration(mesh={"data": 1, "pipe": 4}), jax.devices()[:4], trains=False)

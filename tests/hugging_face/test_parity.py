"""Logits of models equal those of Hugging Face transformers with the same weights, as its fixtures here have them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtron.data.batch import TokenBatch
from jaxtron.data.config import DataConfig
from jaxtron.models.program import Microbatch
from jaxtron.run.configuration import Configuration, TrainConfig
from jaxtron.run.session import make_trainer
from jaxtron.run.step import Trainer
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.parameters import manual_specs, shardings
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, use
from jaxtron.typing import PyTree
from tests.hugging_face.families import FAMILIES, model_of, parameters_of
from tests.hugging_face.fixtures import FOLDER, load

TOLERANCE = 2e-5


def logits_of(trainer: Trainer, params: PyTree, batch: Microbatch[TokenBatch]):
    """What the model's functions make of a microbatch, one layer after the other."""
    program, parts = trainer.program, trainer.parts
    model, working = program.model(parts, None), trainer.working(params)
    (stack,), (layers,) = model.stacks, working.stacks
    x, inputs = stack.enter(working.outer, None, batch), stack.shared(batch)
    for number in range(len(jax.tree.leaves(layers)[0])):
        weights = jax.tree.map(lambda leaf, number=number: leaf[number], layers)
        x = stack.layer(weights, x, jnp.int32(number), inputs).stream
    # the one device has all of it
    return all_reduce(vary(parts.outer(working.outer).predict(x)), current().manual)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.npz")))
def test_logits_are_those_of_transformers(rules_for, name):
    fixture = load(name)
    model, (rows, length) = model_of(fixture), fixture.tokens.shape
    values = parameters_of(fixture, model)
    train = TrainConfig(global_batch=rows, precision="fp32")
    with use(rules_for(data=1)):
        trainer = make_trainer(Configuration(model=model, train=train, data=DataConfig(sequence_length=length)))
        specs = trainer.blueprint.names
        assert {key: value.shape for key, value in values.items()} == {key: spec.shape for key, spec in specs.items()}
        tree = jax.tree.unflatten(jax.tree.structure(trainer.blueprint.parameters), [values[key] for key in specs])
        params = jax.device_put(tree, shardings(trainer.blueprint.parameters))
        batch = TokenBatch(fixture.tokens, fixture.tokens, np.ones(fixture.tokens.shape, np.float32))
        lie, whole = manual_specs(trainer.blueprint.parameters), PartitionSpec()
        run = jax.jit(region(functools.partial(logits_of, trainer), (lie, whole), whole))
        found = np.asarray(run(params, Microbatch(batch, np.arange(rows))))[..., : model.vocab_size]
    assert np.abs(fixture.logits).max() > 3
    np.testing.assert_allclose(found, fixture.logits, rtol=0, atol=TOLERANCE)


def test_every_family_has_a_fixture():
    assert {load(path.stem).config["model_type"] for path in FOLDER.glob("*.npz")} == set(FAMILIES)

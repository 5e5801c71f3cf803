"""Logits of models equal those of Hugging Face transformers with the same weights, as its fixtures here have them."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtron.config import load as load_settings
from jaxtron.data.batch import TokenBatch
from jaxtron.data.config import DataConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.families import DECODER
from jaxtron.run.configuration import Configuration, TrainConfig
from jaxtron.run.session import make_trainer
from jaxtron.run.step import Trainer, batch_sharding
from jaxtron.sharding.rules import use
from jaxtron.typing import PyTree
from jaxtron.weights.hub import FAMILIES, hub_settings
from jaxtron.weights.load import load_parameters
from tests.hugging_face.fixtures import FOLDER, Fixture, load, write
from tests.support.logits import decoded, logits

TOLERANCE = 2e-5
# state-space models and hybrids are held closer
CLOSER = dict.fromkeys(("bamba", "mamba", "mamba2", "nemotron_h"), 1e-5)
# how float32 rounds in another order, as it does a few positions at a time, is up to the kind of processor: of logits
# up to 4.6, 1.0e-5 on some and 2.2e-5 on others
WIDER = {"gpt_oss": 4e-5, "jamba": 4e-5}
# norms on both sides of branches scale rounding of what is small up, and with their logits up to 11
WIDER |= dict.fromkeys(("gemma", "gemma2", "gemma3"), 6e-5)


def trainer_of(model: ModelConfig, fixture: Fixture) -> Trainer:
    rows, length = fixture.tokens.shape
    train = TrainConfig(global_batch=rows, precision="fp32")
    return make_trainer(Configuration(model=model, train=train, data=DataConfig(sequence_length=length)))


def of_fixture(fixture: Fixture, folder: Path) -> tuple[Trainer, PyTree]:
    """Its model, as its files are read."""
    folder = write(folder, fixture.config, fixture.weights)
    config = load_settings(Configuration, None, ["--data.sequence_length", "12"], under=hub_settings(folder))
    trainer = trainer_of(config.model, fixture)
    return trainer, load_parameters(folder, config.model, trainer.blueprint, trainer.partitions)


NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
# what each adds to a llama is in another of the fixtures too
SLOW = {"llama_biases", "mistral"}
# what these add is in gemma3, gpt_neox, cohere or jamba too, or is a layout of their files
SLOW |= {"bloom", "falcon", "falcon_7b", "gemma", "gemma2", "gptj", "granite", "opt", "phi", "starcoder2"}
# each kind of layer goes on from its memory in one of the others
SLOW_TO_GO_ON = {*NAMES} - {"bamba", "deepseek_v2_lite", "gpt_oss", "jamba", "mamba", "phi3"}
# logits are capped in one and scaled in the other, which training does a chunk at a time
SLOW_LOSSES = {*NAMES} - {"gemma2", "granite"}


def marked(slow: set[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in NAMES]


@pytest.mark.parametrize("name", marked(SLOW))
def test_logits_are_those_of_transformers(name, rules_for, tmp_path):
    fixture = load(name)
    with use(rules_for(data=1)):
        found = logits(*of_fixture(fixture, tmp_path), fixture.tokens)[..., : fixture.config["vocab_size"]]
    assert np.abs(fixture.logits).max() > 1
    np.testing.assert_allclose(found, fixture.logits, rtol=0, atol=(CLOSER | WIDER).get(name, TOLERANCE))


@pytest.mark.parametrize("name", marked(SLOW_TO_GO_ON))
def test_what_goes_on_from_memory_has_the_logits_of_the_whole(name, rules_for, tmp_path):
    fixture = load(name)
    # the first part is shorter than what convolutions see
    parts = (2, 1, fixture.tokens.shape[1] - 4, 1)
    with use(rules_for(data=1)):
        found = decoded(*of_fixture(fixture, tmp_path), fixture.tokens, parts)[..., : fixture.config["vocab_size"]]
    expected = fixture.logits[:, np.cumsum(parts) - 1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=(CLOSER | WIDER).get(name, TOLERANCE))


@pytest.mark.parametrize("name", marked(SLOW_LOSSES))
def test_losses_of_training_are_those_of_transformers(name, rules_for, tmp_path):
    """Without logits in memory, as a step computes them; those of experts' balance left out."""
    fixture = load(name)
    inputs, targets = fixture.tokens[:, :-1], fixture.tokens[:, 1:]
    exact = fixture.logits[:, :-1].astype(np.float64)
    chosen = np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    expected = (np.log(np.exp(exact).sum(-1)) - chosen).sum()
    with use(rules_for(data=1)):
        trainer, params = of_fixture(fixture, tmp_path)
        batch = TokenBatch(inputs, targets, np.ones(targets.shape, np.float32))
        sums, _ = jax.jit(trainer.evaluate)(params, jax.device_put(batch, batch_sharding()))
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-5)


def test_every_family_has_a_fixture():
    found = {load(path.stem).config["model_type"] for path in FOLDER.glob("*.npz")}
    assert found == {name for name, family in FAMILIES.items() if family.family == DECODER}

"""BERT's logits and losses equal those of Hugging Face transformers with the same weights, which go both ways."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from jaxtron.config import UserError
from jaxtron.config import load as load_settings
from jaxtron.convert.__main__ import main as convert
from jaxtron.evaluate.__main__ import main as evaluate
from jaxtron.models.bert.batch import BertBatch
from jaxtron.models.program import Microbatch
from jaxtron.run.configuration import configuration_of
from jaxtron.run.session import make_trainer
from jaxtron.run.step import Trainer, batch_sharding
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, use
from jaxtron.typing import PyTree
from jaxtron.weights.hub import FAMILIES, config_of, hub_settings
from jaxtron.weights.load import load_parameters
from tests.hugging_face.fixtures import FOLDER, load_batch, write
from tests.support.commands import run_main
from tests.support.plain import one_by_one
from tests.support.tiny_tokenizer import write_tokenizer

NAMES = sorted(path.stem for path in (FOLDER / "encoders").glob("*.npz"))
TOLERANCE = 1e-5
fixture = functools.cache(functools.partial(load_batch, "encoders"))


def batch_of(found: dict[str, np.ndarray]) -> BertBatch:
    rows = len(found["tokens"])
    return BertBatch(
        tokens=found["tokens"],
        targets=found["targets"],
        weights=found["is_masked"].astype(np.float32),
        token_types=found["types"],
        segments=found["is_text"].astype(np.int32),
        is_swapped=found["swapped"],
        pair_weights=np.ones(rows, np.float32),
    )


def opened(folder: Path, rows: int) -> tuple[Trainer, PyTree]:
    """The model of a directory, as its files are read; inside `use`."""
    flags = ["--data.sequence_length", "14", "--train.global_batch", str(rows), "--train.precision", "fp32"]
    config = load_settings(configuration_of("bert"), None, flags, under=hub_settings(folder)).resolved()
    config = config.model_copy(update={"model": config.family.evaluated(config.model)})
    trainer = make_trainer(config)
    return trainer, load_parameters(folder, config.model, trainer.blueprint, trainer.partitions)


def predicted(trainer: Trainer, params: PyTree, batch: BertBatch) -> tuple[np.ndarray, np.ndarray]:
    """Logits of tokens and of pairs, on one device."""

    def run(params: PyTree, batch: Microbatch[BertBatch]):
        parts = trainer.parts
        model, working = trainer.program.model(parts, None), trainer.working(params)
        (stack,), (layers,) = model.stacks, working.stacks
        x, inputs = stack.enter(working.outer, None, batch), stack.shared(batch)
        for number, (_, _, weights) in enumerate(one_by_one(layers, trainer.stages.partitions[0].kinds)):
            x = stack.layer(weights, x, jnp.int32(number), inputs).stream
        module = parts.outer(working.outer)
        x = module.normed(x)
        found = module.logits(x), module.pair_logits(x)
        return jax.tree.map(lambda array: all_reduce(vary(array), current().manual), found)

    lie, whole = manual_specs(trainer.blueprint.parameters), PartitionSpec()
    rows = jnp.arange(len(batch.tokens))
    tokens, pairs = jax.jit(region(run, (lie, whole), whole))(params, Microbatch(batch, rows))
    return np.asarray(tokens), np.asarray(pairs)


def test_every_encoder_has_a_fixture():
    found = {fixture(name)[0]["model_type"] for name in NAMES}
    assert found == {name for name, family in FAMILIES.items() if family.family == "bert"}


@pytest.mark.parametrize("mesh", ["--mesh.tensor 2", "--mesh.context 2 --mesh.data 2"])
def test_logits_of_rows_are_told_on_any_mesh(mesh, rules_for, tmp_path):
    """Of texts of one part, whatever they are filled up with."""
    config, weights, found = fixture("bert")
    folder, length = write(tmp_path / "bert", config, weights), int(found["is_text"].sum(1).min())
    batch = dataclasses.replace(batch_of(found), token_types=np.zeros_like(found["types"]))
    batch = dataclasses.replace(batch, segments=np.broadcast_to(np.arange(14) < length, found["types"].shape) + 0)
    with use(rules_for(data=1)):
        expected, _ = predicted(*opened(folder, len(batch.tokens)), batch)
    (tmp_path / "ids.json").write_text(json.dumps(found["tokens"][:, :length].tolist()))
    words = ["--token_ids", tmp_path / "ids.json", "--logits", tmp_path / "out.npy", *mesh.split()]
    ended = run_main(evaluate, [folder, *words])
    assert (ended.code, ended.err) == (0, ""), ended
    logits = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(logits, expected[:, :length, : config["vocab_size"]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss_are_those_of_transformers(name, rules_for, tmp_path):
    config, weights, found = fixture(name)
    batch = batch_of(found)
    with use(rules_for(data=1)):
        trainer, params = opened(write(tmp_path, config, weights), len(batch.tokens))
        tokens, pairs = predicted(trainer, params, batch)
        sums, counts = jax.jit(trainer.evaluate)(params, jax.device_put(batch, batch_sharding()))
    assert np.abs(found["logits"]).max() > 1
    # of padding nothing is asked
    is_text = found["is_text"]
    here = tokens[..., : config["vocab_size"]]
    np.testing.assert_allclose(here[is_text], found["logits"][is_text], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(pairs, found["pair_logits"], rtol=0, atol=TOLERANCE)
    assert counts["masked tokens"] == found["is_masked"].sum() and counts["pairs"] == len(pairs)
    sums, counts = ({name: float(value) for name, value in one.items()} for one in (sums, counts))
    assert trainer.program.loss(sums, counts) == pytest.approx(float(found["loss"]), rel=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_becomes_a_run_and_files_again(name, tmp_path):
    config, weights, _ = fixture(name)
    folder = write(tmp_path / "theirs", config, weights)
    run, back = tmp_path / "run", tmp_path / "back"
    words = ["--data.tokenizer", str(write_tokenizer(tmp_path / "letters")), "--data.sequence_length", "14"]
    convert(["--from", str(folder), "--to", str(run), *words])
    convert(["--from", str(run), "--to", str(back)])
    again = load_file(back / "model.safetensors")
    assert again.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    said = json.loads((back / "config.json").read_text())
    for key in ("model_type", "architectures", "hidden_act", "layer_norm_eps", "vocab_size", "type_vocab_size"):
        assert said[key] == config[key], key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, 'only "absolute" is known here'),
        (
            {"architectures": ["BertForQuestionAnswering"]},
            "only weights of BertForPreTraining or BertForMaskedLM are",
        ),
        ({"is_decoder_twice": True}, "that key of a bert is not known here"),
    ],
)
def test_what_is_not_known_is_refused(change, message, tmp_path):
    config, weights, _ = fixture("bert")
    with pytest.raises(UserError, match=message):
        hub_settings(write(tmp_path, config | change, weights))


def test_a_model_of_masked_tokens_alone_leaves_the_other_heads(rules_for, tmp_path):
    config, weights, _ = fixture("bert")
    folder = write(tmp_path, config | {"architectures": ["BertForMaskedLM"]}, weights)
    with use(rules_for(data=1)):
        trainer, _ = opened(folder, 3)
    assert not any("pool" in name or "pairs" in name for name in trainer.blueprint.names)


def test_names_of_the_first_files_are_read(rules_for, tmp_path):
    config, weights, found = fixture("bert")
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for key, value in weights.items():
        end = ".".join(key.split(".")[-2:])
        old[key.replace(end, norms.get(end, end))] = value
    old["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    with use(rules_for(data=1)):
        trainer, params = opened(write(tmp_path, config, old), 3)
        _, pairs = predicted(trainer, params, batch_of(found))
    np.testing.assert_allclose(pairs, found["pair_logits"], rtol=0, atol=TOLERANCE)


def test_what_no_class_says_is_told():
    model = configuration_of("bert")().resolved().model
    with pytest.raises(UserError, match="of Hugging Face cannot say model.activation relu|model.activation"):
        config_of(model.model_copy(update={"activation": "swiglu"}), began={}, positions=16)
    with pytest.raises(UserError, match="LlamaForCausalLM of Hugging Face is no class of model.family bert"):
        config_of(model, began={}, positions=16, name="llama")
    said = config_of(model, began={}, positions=16)
    assert said.values["architectures"] == ["MegatronBertForPreTraining"]

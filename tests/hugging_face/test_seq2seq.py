"""T5's logits and losses equal those of Hugging Face transformers with the same weights, which go both ways."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtron.config import UserError
from jaxtron.config import load as load_settings
from jaxtron.convert.__main__ import main as convert
from jaxtron.evaluate.__main__ import main as evaluate
from jaxtron.generate.engine import GenerationEngine
from jaxtron.generate.settings import SamplingSettings
from jaxtron.models.t5.batch import T5Batch
from jaxtron.run.configuration import Configuration, configuration_of
from jaxtron.run.session import make_session, make_trainer
from jaxtron.run.step import Trainer, batch_sharding
from jaxtron.sharding.rules import use
from jaxtron.typing import PyTree
from jaxtron.weights.hub import hub_settings
from jaxtron.weights.load import load_parameters
from tests.hugging_face.fixtures import FOLDER, load_batch, write
from tests.support.commands import run_main
from tests.support.drawn import made
from tests.support.logits import stack_logits
from tests.support.tiny_tokenizer import write_tokenizer

NAMES = sorted(path.stem for path in (FOLDER / "seq2seq").glob("*.npz"))
TOLERANCE = 1e-5
fixture = functools.cache(functools.partial(load_batch, "seq2seq"))


def batch_of(found: dict[str, np.ndarray]) -> T5Batch:
    """The decoder reads what it is to write, one later, after the padding's token."""
    targets = np.where(found["is_asked"], found["targets"], 0)
    return T5Batch(
        tokens=found["tokens"],
        segments=found["is_text"].astype(np.int32),
        decoder_tokens=np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        decoder_segments=found["is_asked"].astype(np.int32),
        targets=targets,
        weights=found["is_asked"].astype(np.float32),
    )


def configured(folder: Path, implementation: str = "auto") -> Configuration:
    """The settings of a directory, for sequences as long as the fixtures'."""
    flags = ["--data.sequence_length", "24", "--model.decoder_length", "14", "--train.global_batch", "3"]
    flags += ["--train.precision", "fp32", "--model.attention.implementation", implementation, "--mesh.data", "1"]
    config = load_settings(configuration_of("t5"), None, flags, under=hub_settings(folder)).resolved()
    return config.model_copy(update={"model": config.family.evaluated(config.model)})


def opened(folder: Path, implementation: str) -> tuple[Trainer, PyTree]:
    """The model of a directory, as its files are read; inside `use`."""
    config = configured(folder, implementation)
    trainer = make_trainer(config)
    return trainer, load_parameters(folder, config.model, trainer.blueprint, trainer.partitions)


@pytest.mark.parametrize(("name", "implementation"), [("t5", "xla"), ("t5_v1_1", "auto")])
def test_logits_and_loss_are_those_of_transformers(name, implementation, rules_for, tmp_path):
    config, weights, found = fixture(name)
    batch = batch_of(found)
    with use(rules_for(data=1)):
        trainer, params = opened(write(tmp_path, config, weights), implementation)
        logits = stack_logits(trainer, params, batch)[..., : config["vocab_size"]]
        sums, counts = jax.jit(trainer.evaluate)(params, jax.device_put(batch, batch_sharding()))
    assert np.abs(found["logits"]).max() > 1
    # of padding nothing is asked
    asked = found["is_asked"]
    np.testing.assert_allclose(logits[asked], found["logits"][asked], rtol=0, atol=TOLERANCE)
    sums, counts = ({name: float(value) for name, value in told.items()} for told in (sums, counts))
    assert trainer.program.loss(sums, counts) == pytest.approx(float(found["loss"]), rel=TOLERANCE)
    assert counts == {"tokens": asked.sum()}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_becomes_a_run_and_files_again(name, tmp_path):
    config, weights, _ = fixture(name)
    folder = write(tmp_path / "theirs", config, weights)
    run, back = tmp_path / "run", tmp_path / "back"
    words = ["--data.tokenizer", str(write_tokenizer(tmp_path / "letters")), "--data.sequence_length", "24"]
    convert(["--from", str(folder), "--to", str(run), *words])
    convert(["--from", str(run), "--to", str(back)])
    again = load_file(back / "model.safetensors")
    assert again.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    said = json.loads((back / "config.json").read_text())
    for key in ("model_type", "architectures", "feed_forward_proj", "d_kv", "num_decoder_layers", "vocab_size"):
        assert said[key] == config[key], key
    assert said["scale_decoder_outputs"] == config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_encoder_decoder": False}, "only true is known here"),
        ({"feed_forward_proj": "gated-swish2"}, "gelu, gelu_new, or relu are known here"),
        ({"architectures": ["T5EncoderModel"]}, "only weights of T5ForConditionalGeneration are read"),
        ({"relative_attention": False}, "that key of a t5 is not known here"),
    ],
)
def test_what_is_not_known_is_refused(change, message, tmp_path):
    config, weights, _ = fixture("t5")
    with pytest.raises(UserError, match=message):
        hub_settings(write(tmp_path, config | change, weights))


def test_a_model_that_was_saved_anew_is_tied_as_it_was(tmp_path):
    """The class of 5.x says of each that it is tied."""
    config, weights, _ = fixture("t5_v1_1")
    said = config | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert hub_settings(write(tmp_path / "saved", said, weights)).tree["model"]["tied_head"] is False
    assert hub_settings(write(tmp_path / "released", config, weights)).tree["model"]["tied_head"] is False


@pytest.mark.parametrize("mesh", ["--mesh.tensor 2", "--mesh.pipe 2 --pipeline.schedule interleaved"])
def test_logits_of_rows_are_told_on_any_mesh(mesh, tmp_path):
    """A text, and what is written of it, of another length."""
    config, weights, found = fixture("t5")
    folder, batch = write(tmp_path / "t5", config, weights), batch_of(found)
    # the first row has no padding
    rows = {"tokens": batch.tokens[:1].tolist(), "decoder_tokens": batch.decoder_tokens[:1].tolist()}
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    words = ["--token_ids", tmp_path / "ids.json", "--logits", tmp_path / "out.npy", *mesh.split()]
    ended = run_main(evaluate, [folder, *words])
    assert (ended.code, ended.err) == (0, ""), ended
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), found["logits"][:1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2]], 'a T5 reads a text and writes another: give {"tokens": [...], "decoder_tokens": [...]}'),
        ({"tokens": [[1]]}, "must be rows, or an object of two: tokens and decoder_tokens"),
        ({"tokens": [[1]], "decoder_tokens": [[1], [2]]}, "has 1 rows of tokens and 2 of decoder_tokens: give as many"),
        ({"tokens": [[1]], "decoder_tokens": [[40]]}, "has the token 40, and the model knows 0 to 39"),
    ],
)
def test_rows_that_do_not_go_together_are_told(rows, message, tmp_path):
    config, weights, _ = fixture("t5")
    folder = write(tmp_path / "t5", config, weights)
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    ended = run_main(evaluate, [folder, "--token_ids", tmp_path / "ids.json", "--logits", tmp_path / "out.npy"])
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, ended
    assert not (tmp_path / "out.npy").exists()


RULES = {"answers": {}, "penalized": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}}


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_transformers(name, tmp_path):
    """The likeliest tokens, of texts of three lengths in one batch; what ends an answer is not to come yet.

    Rules look at the answer and what it begins with, not at the text.
    """
    config, weights, found = fixture(name)
    folder, count = write(tmp_path, config, weights), found["answers"].shape[1] - 1
    settings = configured(folder)
    session = make_session(settings, jax.devices()[:1], trains=False)
    with session.use():
        params = load_parameters(folder, settings.model, session.blueprint, session.trainer.partitions)
    engine = GenerationEngine(session, params, rows=4, room=24, opening=(config["decoder_start_token_id"],))
    texts = [row[here] for row, here in zip(found["tokens"], found["is_text"], strict=True)]
    end = (config["eos_token_id"],)
    for rule, changes in RULES.items():
        own = SamplingSettings(temperature=0.0, seed=0, min_new_tokens=count, eos_token_ids=end, **changes)
        answers = [[one.token for one in row] for row in made(engine, texts, [own] * len(texts), count)]
        assert answers == found[rule][:, 1:].tolist(), rule

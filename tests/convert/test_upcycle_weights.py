"""`python -m jaxtron.convert upcycle` of Hugging Face weights: the mixture computes what they do."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxtron.config import load
from jaxtron.convert import __main__ as convert
from jaxtron.run.configuration import Configuration
from jaxtron.run.restored import restore_model
from jaxtron.run.session import make_session
from tests.hugging_face import fixtures
from tests.support.commands import Ended, run_main
from tests.support.logits import logits

TEXT = "the cat sat on a mat and ran off to see what made such noise\n" * 60
HALVES = ("model-00001-of-00002", "model-00002-of-00002")


def upcycle(*words: object) -> Ended:
    return run_main(convert.main, ("upcycle", *words))


def write_tokenizer(folder: Path) -> None:
    """Characters of the text, as many as the fixtures know."""
    tokenizer = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate(sorted(set(TEXT)))}, "e"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


def weights(folder: Path, name: str = "llama", **changes: object) -> Path:
    """A directory of a fixture in bfloat16, in two files, with a tokenizer; with other keys of its config.json."""
    fixture = fixtures.load(name)
    arrays = {key: array.astype(ml_dtypes.bfloat16) for key, array in fixture.weights.items()}
    fixtures.write(folder, fixture.config | changes, arrays, HALVES)
    write_tokenizer(folder)
    return folder


def data_flags(folder: Path) -> list[object]:
    (folder / "text.txt").write_text(TEXT)
    return [
        "--data.path",
        folder / "text.txt",
        "--data.cache_directory",
        folder / "tokens",
        "--data.sequence_length",
        12,
    ]


ONE_DEVICE = [word for axis in ("pipe", "tensor", "fsdp") for word in (f"--mesh.{axis}", "1")]
MESH = ["--mesh.pipe", 2, "--mesh.tensor", 2, "--mesh.fsdp", 2, "--train.microbatches", 2]


def test_a_mixture_has_the_logits_of_the_dense_model_in_transformers(tmp_path: Path):
    source, output = weights(tmp_path / "dense"), tmp_path / "mixture"
    flags = ["--experts", 2, "--granularity", 4, "--scores", "topk_softmax", "--train.precision", "fp32"]
    made = upcycle(source, "--output", output, *flags, *MESH, *data_flags(tmp_path))
    assert (made.code, made.err) == (0, ""), made
    config = load(Configuration, output / "config.yaml", ONE_DEVICE)
    assert config.data.tokenizer == str(source / "tokenizer.json")
    (entry,) = (json.loads(line) for line in (output / "history.jsonl").read_text().splitlines())
    assert entry["upcycled"]["weights"] == str(source) and "step" not in entry["upcycled"] and entry["step"] == 0
    assert entry["changes"]["model.pattern"] == ["*-", "*E"] and "model.hidden_size" not in entry["changes"]
    session = make_session(config, jax.devices()[:1], trains=False)
    fixture = fixtures.load("llama")
    with session.use():
        params = restore_model(session, output, config, None).params
        found = logits(session.trainer, params, fixture.tokens)[..., : config.model.vocab_size]
    assert np.abs(found - fixture.logits).max() < 1e-5 * np.abs(fixture.logits).max()


@pytest.mark.parametrize(
    ("name", "changes", "flags", "said"),
    [
        (
            "gpt2",
            {"n_positions": 1024},
            "",
            "has model.bias true, and its biases cannot become those of experts: a model without can be",
        ),
        (
            "llama_biases",
            {},
            "",
            "has model.bias true, and its biases cannot become those of experts: a model without can be upcycled",
        ),
        ("llama", {"model_type": "rwkv"}, "", 'config.json has model_type "rwkv": known here are bamba'),
        (
            "llama",
            {"num_key_value_heads": 3},
            "",
            "config.json: model.num_heads 4 is not a multiple of model.num_kv_he",
        ),
        ("llama", {}, "--step 3", "--step 3 is of a run's checkpoints, and "),
        ("llama", {}, "--granularity 7", "--granularity 7: model.mlp_size 40 of "),
        ("llama", {}, "--model.rotary.base 5", "--model.rotary.base is not for this command: leave it out"),
        ("llama", {}, "--data.tokenizer bytes", "give the model's with --data.tokenizer"),
        ("llama", {"num_hidden_layers": 3}, "", "needs model.layers.2."),
    ],
    ids=str,
)
def test_weights_that_cannot_be_upcycled(name: str, changes: dict, flags: str, said: str, tmp_path: Path):
    source = weights(tmp_path / "dense", name, **changes)
    ended = upcycle(source, "--output", tmp_path / "new", *flags.split(), "--mesh.data", 8, *data_flags(tmp_path))
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_in_another_form_has_to_be_given(tmp_path: Path):
    source = weights(tmp_path / "dense")
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    ended = upcycle(source, "--output", tmp_path / "new")
    assert ended.code == 2 and f"give --data.tokenizer, such as --data.tokenizer {source}/tokenizer.model" in ended.err

"""Answers of an encoder-decoder to texts of several lengths: token for token those of whole forwards, on every mesh."""

import functools

import jax
import numpy as np
import pytest

from jaxtron.config import load
from jaxtron.generate.engine import GenerationEngine
from jaxtron.generate.opening import of_any_length
from jaxtron.generate.settings import SamplingSettings
from jaxtron.models.t5.batch import T5Batch
from jaxtron.run.configuration import configuration_of
from jaxtron.run.session import RunSession, make_session
from tests.support.drawn import made
from tests.support.logits import stack_logits

ROOM, VOCAB, BEGIN, COUNT = 24, 50, 41, 7
GREEDY = SamplingSettings(temperature=0.0, seed=0, logprobs=0)
# large weights: answers that depend on the text and the layers; distances beyond the last bucket
FLAGS = (
    "--model.encoder_layers 2 --model.decoder_layers 3 --model.hidden_size 32 --model.num_heads 4 --model.head_dim 6 "
    "--model.mlp_size 40 --model.vocab_size 50 --model.vocab_multiple 8 --model.num_buckets 8 --model.max_distance 6 "
    "--model.initial_factor 2 --model.decoder_length 5 --train.precision fp32 --data.sequence_length 21"
)
FORMS = {"1.0": "", "1.1": "--model.activation geglu_tanh --model.tied_head false"}
MESHES = ("", "--mesh.tensor 4", "--mesh.pipe 2", "--mesh.pipe 2 --mesh.data 2 --mesh.tensor 2", "--mesh.data 2")
QUICK = {("1.1", ""), ("1.0", "--mesh.pipe 2 --mesh.data 2 --mesh.tensor 2")}
TEXTS = [np.random.default_rng(number).integers(0, VOCAB, length) for number, length in enumerate((9, 1, 24, 17, 4))]


def session(form: str, mesh: str = "") -> RunSession:
    flags = f"--model.family t5 {FLAGS} {FORMS[form]} {mesh}".split()
    flags += [] if "--mesh.data" in flags else ["--mesh.data", "1"]
    config = load(configuration_of("t5"), None, flags)
    count = config.mesh.data * config.mesh.tensor * config.mesh.pipe
    return make_session(of_any_length(config, count), jax.devices()[:count], trains=False)


def engine(form: str, mesh: str = "", rows: int = 4) -> GenerationEngine:
    found = session(form, mesh)
    return GenerationEngine(found, found.initial_state().params, rows=rows, room=ROOM, opening=(BEGIN,))


@functools.cache
def alone(form: str) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
    """The likeliest tokens, each by a forward of the whole text and answer, and their log-probabilities."""
    found, rows = session(form), len(TEXTS)
    params = found.initial_state().params
    tokens, segments = (np.zeros((rows, ROOM), np.int32) for _ in range(2))
    for row, text in enumerate(TEXTS):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    answers, nothing = np.full((rows, COUNT + 1), BEGIN, np.int32), np.zeros((rows, COUNT + 1), np.float32)
    logprobs = np.zeros((rows, COUNT))
    for place in range(COUNT):
        batch = T5Batch(tokens, segments, answers, np.ones_like(answers), answers, nothing)
        with found.use():
            of_all = stack_logits(found.trainer, params, batch)[:, place, :VOCAB]
        answers[:, place + 1] = of_all.argmax(-1)
        logprobs[:, place] = np.asarray(jax.nn.log_softmax(of_all)).max(-1)
    return tuple(tuple(map(int, row[1:])) for row in answers), logprobs


@pytest.mark.parametrize(
    ("form", "mesh"),
    [
        pytest.param(form, mesh, marks=[] if (form, mesh) in QUICK else pytest.mark.slow)
        for form in FORMS
        for mesh in MESHES
    ],
)
def test_answers_are_those_of_whole_forwards_whatever_else_is_in_the_batch(form: str, mesh: str) -> None:
    found = made(engine(form, mesh), TEXTS, [GREEDY] * len(TEXTS), COUNT)
    tokens, logprobs = alone(form)
    assert tuple(tuple(one.token for one in row) for row in found) == tokens
    np.testing.assert_allclose([[one.logprob for one in row] for row in found], logprobs, atol=1e-4)
    assert len(set(tokens)) == len(TEXTS)

"""Sequences that come and go in a batch: token for token what whole forwards of each alone would give."""

import functools

import jax
import numpy as np
import pytest

from jaxtron.config import UserError, load
from jaxtron.generate.engine import GenerationEngine
from jaxtron.generate.settings import SamplingSettings
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from tests.support.drawn import made
from tests.support.logits import logits

ROOM, VOCAB = 32, 50
GREEDY = SamplingSettings(temperature=0.0, seed=0)
# large weights: text that depends on the prompt and the layers
FLAGS = (
    "--model.pattern M*-W-E --model.num_layers 1 --model.hidden_size 32 --model.num_heads 4 --model.num_kv_heads 2 "
    "--model.vocab_size 50 --model.vocab_multiple 32 --model.initial_std 0.3 --model.attention.window 6 "
    "--model.mamba.num_heads 4 --model.mamba.head_dim 8 --model.mamba.state_size 8 --model.mamba.num_groups 2 "
    "--model.moe.num_experts 4 "
    "--model.position rotary --model.bias false --train.precision fp32 --data.sequence_length 32 --train.global_batch 8"
)
MESHES = ("", "--mesh.tensor 4", "--mesh.pipe 2 --mesh.data 2", "--mesh.data 2 --mesh.tensor 2")
QUICK = {"--mesh.pipe 2 --mesh.data 2"}
# one longer than the window, two of the same length
PROMPTS = [np.random.default_rng(number).integers(0, VOCAB, length) for number, length in enumerate((9, 1, 4, 17, 4))]


def session(mesh: str) -> RunSession:
    flags = f"{FLAGS} {mesh}".split()
    if "--mesh.data" not in flags:
        flags += ["--mesh.data", "1"]
    config = load(Configuration, None, flags).resolved()
    sizes = config.mesh.shape(8) if "-1" in flags else config.mesh.model_dump()
    count = int(np.prod([sizes[name] for name in ("data", "tensor", "pipe")]))
    return make_session(config, jax.devices()[:count], trains=False)


def engine(mesh: str = "", rows: int = 4) -> GenerationEngine:
    found = session(mesh)
    return GenerationEngine(found, found.initial_state().params, rows=rows, room=ROOM)


@functools.cache
def alone() -> tuple[tuple[int, ...], ...]:
    """The likeliest tokens, each by a forward of the whole sequence."""
    found, texts = session(""), [prompt.tolist() for prompt in PROMPTS]
    params = found.initial_state().params
    for _ in range(6):
        # padding behind is not seen; one length for all, so that one program serves
        padded = np.zeros((len(texts), ROOM), np.int32)
        for row, tokens in enumerate(texts):
            padded[row, : len(tokens)] = tokens
        with found.use():
            of_all = logits(found.trainer, params, padded)
        for row, tokens in enumerate(texts):
            tokens.append(int(of_all[row, len(tokens) - 1, :VOCAB].argmax()))
    return tuple(tuple(tokens[len(prompt) :]) for tokens, prompt in zip(texts, PROMPTS, strict=True))


@pytest.mark.parametrize(
    "mesh", [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES]
)
def test_text_is_that_of_whole_forwards_whatever_else_is_in_the_batch(mesh: str) -> None:
    found = made(engine(mesh), PROMPTS, [GREEDY] * len(PROMPTS), 6)
    assert tuple(tuple(one.token for one in row) for row in found) == alone()
    assert len(set(alone())) == len(PROMPTS)


@pytest.mark.slow
def test_draws_do_not_depend_on_the_batch() -> None:
    settings = [SamplingSettings(temperature=1.5, top_k=20, seed=number) for number in range(len(PROMPTS))]
    together = made(engine(), PROMPTS, settings, 5)
    reused = engine(rows=1)
    apart = [made(reused, [prompt], [own], 5)[0] for prompt, own in zip(PROMPTS, settings, strict=True)]
    assert [[one.token for one in row] for row in together] == [[one.token for one in row] for row in apart]


def test_probabilities_are_those_of_a_score() -> None:
    found = engine()
    settings = SamplingSettings(temperature=0.0, seed=0, logprobs=3)
    text = made(found, PROMPTS[:2], [settings] * 2, 4)
    whole = [np.concatenate([prompt, [one.token for one in row]]) for prompt, row in zip(PROMPTS, text, strict=False)]
    for prompt, row, (logprobs, ids, best) in zip(PROMPTS, text, found.score(whole, top=3), strict=False):
        assert logprobs.shape == (len(prompt) + 3,) and ids.shape == best.shape == (len(prompt) + 3, 3)
        np.testing.assert_allclose(logprobs[len(prompt) - 1 :], [one.logprob for one in row], rtol=1e-4)
        np.testing.assert_array_equal(ids[len(prompt) - 1 :], [[token for token, _ in one.top] for one in row])
        np.testing.assert_allclose(best[:, 0][len(prompt) - 1 :], [one.top[0][1] for one in row], rtol=1e-4)


def test_a_sequence_ends_where_there_is_no_more_room(caplog: pytest.LogCaptureFixture) -> None:
    found = engine()

    def compiled(row: int) -> int:
        caplog.clear()
        found.begin(row, np.arange(ROOM - 2), GREEDY)
        assert [len(found.step()) for _ in range(3)] == [1, 1, 0]
        found.end(row)
        return caplog.text.count("Compiling")

    with jax.log_compiles():
        # a second one of that length finds every program
        assert compiled(2) > 0 and compiled(1) == 0
    assert found.free == [0, 1, 2, 3]
    with pytest.raises(UserError, match="does not leave room in 32"):
        found.begin(0, np.zeros(ROOM, np.int32), GREEDY)
    with pytest.raises(UserError, match="token 50"):
        found.begin(0, np.asarray([VOCAB]), GREEDY)
    with pytest.raises(ValueError, match="row 4 is not free"):
        found.begin(4, np.arange(3), GREEDY)


def test_logits_that_are_not_finite_end_it() -> None:
    own = session("")
    params = jax.tree.map(lambda leaf: leaf * np.nan, own.initial_state().params)
    broken = GenerationEngine(own, params, rows=1, room=ROOM)
    broken.begin(0, np.arange(3), GREEDY)
    with pytest.raises(FloatingPointError, match="token 1 are not finite"):
        broken.step()

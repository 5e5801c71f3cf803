"""Rules of sampling against plain NumPy, one row at a time, and against what transformers' processors gave."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.generate.sampling import (
    NO_TOKEN,
    SamplingFeatures,
    SamplingState,
    adjusted,
    choose,
    empty_state,
    features_of,
    place,
)
from jaxtron.generate.settings import SamplingSettings
from jaxtron.sharding.rules import use

VOCAB, ROOM = 23, 16
GOLDEN = Path(__file__).parent / "golden_processors.json"
PARTS = ("stablehlo.sort", "chlo.top_k", "threefry", "stablehlo.while")
chosen = jax.jit(choose, static_argnums=2)
left = jax.jit(adjusted, static_argnums=2)
EVERY = SamplingFeatures(edits=True, ngrams=True, draws=True, cuts=True, typical=True, top=5)


def state_of(rows: list[tuple[SamplingSettings, list[int], list[int]]], room: int = ROOM) -> SamplingState:
    """A batch of settings, prompts and outputs so far."""
    state = empty_state(len(rows), room)
    for number, (settings, prompt, output) in enumerate(rows):
        state = place(state, number, settings.seeded(0), np.array([*prompt, *output], np.int32))
        state = replace(state, prompt_length=state.prompt_length.at[number].set(len(prompt)))
    return state


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def reference(logits: np.ndarray, settings: SamplingSettings, prompt: list[int], output: list[int]) -> np.ndarray:
    """The rules as words have them, token by token in float64."""
    scores, tokens = logits.astype(np.float64).copy(), [*prompt, *output]
    for token, bias in settings.logit_bias.items():
        scores[token] += bias
    for token in range(len(scores)):
        if token in tokens:
            scores[token] *= settings.repetition_penalty if scores[token] < 0 else 1 / settings.repetition_penalty
        scores[token] -= settings.frequency_penalty * output.count(token)
        scores[token] -= settings.presence_penalty * (token in output)
    size = settings.no_repeat_ngram_size
    if size:
        seen = {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}
        last = tuple(tokens[len(tokens) - size + 1 :])
        for token in range(len(scores)):
            if (*last, token) in seen:
                scores[token] = -np.inf
    if len(output) < settings.min_new_tokens:
        scores[list(settings.ends)] = -np.inf
    if not settings.draws:
        return scores
    scores /= settings.temperature
    if settings.top_k:
        scores[scores < np.sort(scores)[-min(settings.top_k, len(scores))]] = -np.inf
    order = np.argsort(-scores, kind="stable")
    mass = 0.0
    for rank, token in enumerate(order):
        probability = softmax(scores)[token]
        if rank and settings.top_p < 1 and mass >= settings.top_p:
            scores[order[rank:]] = -np.inf
            break
        mass += probability
    probabilities = softmax(scores)
    scores[probabilities < settings.min_p * probabilities.max()] = -np.inf
    if settings.typical_p < 1:
        probabilities = softmax(scores)
        likely = probabilities > 0
        information = np.full_like(scores, np.inf)
        information[likely] = -np.log(probabilities[likely])
        entropy = (probabilities[likely] * information[likely]).sum()
        distance = np.abs(information - entropy)
        mass = 0.0
        for rank, token in enumerate(ranks := np.argsort(distance, kind="stable")):
            if rank and mass >= settings.typical_p:
                scores[ranks[rank:]] = -np.inf
                break
            mass += probabilities[token]
    return scores


SETTINGS = [
    SamplingSettings(temperature=0.0),
    SamplingSettings(),
    SamplingSettings(temperature=0.3),
    SamplingSettings(top_k=1),
    SamplingSettings(top_k=5, temperature=2.0),
    SamplingSettings(top_k=500),
    SamplingSettings(top_p=0.0),
    SamplingSettings(top_p=0.6),
    SamplingSettings(top_p=0.999),
    SamplingSettings(min_p=0.2),
    SamplingSettings(min_p=1.0),
    SamplingSettings(typical_p=0.3),
    SamplingSettings(typical_p=0.9),
    SamplingSettings(repetition_penalty=1.7, temperature=0.0),
    SamplingSettings(repetition_penalty=0.5),
    SamplingSettings(presence_penalty=1.5),
    SamplingSettings(frequency_penalty=-0.7, presence_penalty=0.3),
    SamplingSettings(no_repeat_ngram_size=1),
    SamplingSettings(no_repeat_ngram_size=2, temperature=0.0),
    SamplingSettings(no_repeat_ngram_size=3),
    SamplingSettings(no_repeat_ngram_size=40),
    SamplingSettings(min_new_tokens=9, eos_token_ids=(3, 22), stop_token_ids=(0,)),
    SamplingSettings(min_new_tokens=9, eos_token_ids=(3, 22), ignore_eos=True),
    SamplingSettings(min_new_tokens=2, eos_token_ids=(3,)),
    SamplingSettings(logit_bias={0: 4.0, 22: -100.0, 7: 0.5}),
    SamplingSettings(
        logit_bias={1: 2.0},
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        no_repeat_ngram_size=2,
        min_new_tokens=8,
        eos_token_ids=(5,),
        temperature=0.7,
        top_k=12,
        top_p=0.9,
        min_p=0.02,
        typical_p=0.95,
    ),
]


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, list[tuple[SamplingSettings, list[int], list[int]]]]:
    """A row of every setting, with runs of tokens that come twice."""
    rng = np.random.default_rng(0)
    rows = [
        (settings, rng.integers(0, 6, int(rng.integers(1, 8))).tolist(), rng.integers(0, 6, length % 7).tolist())
        for length, settings in enumerate(SETTINGS)
    ]
    return rng.normal(0, 2, (len(rows), VOCAB)).astype(np.float32), rows


def test_every_rule_is_the_plain_one_whatever_the_other_rows_are(batch):
    logits, rows = batch
    found = np.asarray(left(logits, state_of(rows), EVERY))
    for number, row in enumerate(rows):
        wanted = reference(logits[number], *row)
        np.testing.assert_allclose(found[number], wanted, rtol=2e-6, atol=2e-6, err_msg=str(row[0]))


def test_a_row_alone_is_as_in_the_batch_and_takes_what_it_uses(batch):
    logits, rows = batch
    together, _ = chosen(jnp.asarray(logits), state_of(rows), EVERY)
    for number, row in enumerate(rows):
        features = features_of([row[0]])
        alone, _ = chosen(jnp.asarray(logits[number : number + 1]), state_of([row]), features)
        assert int(alone.tokens[0]) == int(together.tokens[number]), row[0]
        wanted = logits[number].astype(np.float64) - np.log(np.exp(logits[number].astype(np.float64)).sum())
        token = int(alone.tokens[0])
        np.testing.assert_allclose(alone.logprobs[0], wanted[token], rtol=1e-5)
        assert token == np.argmax(logits[number]) or features != SamplingFeatures()


def test_greedy_is_no_more_than_the_best(batch):
    logits, rows = batch
    features = features_of([SamplingSettings(temperature=0.0)])
    text = chosen.lower(logits, state_of(rows), features).as_text()
    assert features == SamplingFeatures() and not any(word in text for word in PARTS)
    # and with everything there is all of it
    whole = chosen.lower(logits, state_of(rows), EVERY).as_text()
    assert all(word in whole for word in PARTS)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.76, 3), (0.9, 3), (0.95, 4), (1.0, 4)]
)
def test_top_p_keeps_the_token_that_crosses(top_p: float, kept: int):
    scores = np.log(np.array([[0.25, 0.5, 0.1, 0.15]], np.float32))
    state = state_of([(SamplingSettings(top_p=top_p), [0], [])])
    assert np.isfinite(left(jnp.asarray(scores), state, EVERY)).sum() == kept


def test_top_k_keeps_all_that_are_as_good():
    state = state_of([(SamplingSettings(top_k=2), [0], [])])
    assert np.isfinite(left(jnp.array([[1.0, 1.0, 1.0, 0.0]]), state, EVERY)).tolist() == [[True] * 3 + [False]]


def test_of_equals_the_first():
    choice, _ = chosen(jnp.array([[0.0, 3.0, 3.0]]), state_of([(SamplingSettings(temperature=0.0), [0], [])]), EVERY)
    assert choice.tokens.tolist() == [1]
    state = state_of([(SamplingSettings(top_p=0.3), [0], [])])
    assert np.isfinite(left(jnp.array([[0.0, 3.0, 3.0]]), state, EVERY)).tolist() == [[False, True, False]]


def test_where_every_token_is_forbidden_none_is():
    settings = SamplingSettings(no_repeat_ngram_size=1, temperature=0.0)
    choice, _ = chosen(jnp.array([[0.0, 2.0, 1.0]]), state_of([(settings, [0, 1, 2], [])]), EVERY)
    assert choice.tokens.tolist() == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_no_token_to_their_row_alone(bad: float):
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 4] = bad
    rows = [(SamplingSettings(temperature=float(temperature)), [1], []) for temperature in (0, 1, 1)]
    choice, _ = chosen(jnp.asarray(logits), state_of(rows), EVERY)
    assert (np.asarray(choice.tokens) == NO_TOKEN).tolist() == [False, True, False]


def test_draws_follow_the_distribution_and_their_seed_alone():
    settings = SamplingSettings(temperature=1.5, top_k=4)
    logits = np.random.default_rng(1).normal(0, 1.5, VOCAB).astype(np.float32)
    rows = 4096
    one = state_of([(settings, [1], [])])
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), one)
    seeds = jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], 1)
    many = replace(many, seed=seeds)
    features = features_of([settings])
    tokens = np.asarray(chosen(jnp.broadcast_to(logits, (rows, VOCAB)), many, features)[0].tokens)
    wanted = softmax(reference(logits, settings, [1], []))
    count = np.bincount(tokens, minlength=VOCAB)
    assert (count[wanted == 0] == 0).all()
    # chi-squared with 3 degrees of freedom: above 16.3 once in a thousand
    kept = wanted > 0
    assert ((count - rows * wanted)[kept] ** 2 / (rows * wanted)[kept]).sum() < 16.3
    # row 77 alone, placed by its seed, whatever stands in the other rows
    alone = state_of([(SamplingSettings(top_p=0.5), [2, 3], [4]), (settings.seeded(0, 77), [1], [])])
    both = np.stack([logits[::-1], logits])
    assert int(chosen(jnp.asarray(both), alone, EVERY)[0].tokens[1]) == tokens[77]


def test_a_sequence_is_drawn_alike_wherever_its_row_is_and_whenever_it_came():
    rng = np.random.default_rng(2)
    table = jnp.asarray(rng.normal(0, 1, (VOCAB, VOCAB)).astype(np.float32))

    def text(rows: int, row: int, wait: int) -> list[int]:
        state = empty_state(rows, ROOM)
        for other in range(rows):
            state = place(state, other, SamplingSettings(seed=9 + other), np.array([other]))
        found = []
        for number in range(wait + 10):
            if number == wait:
                settings = SamplingSettings(temperature=0.8, seed=5, frequency_penalty=0.5, top_p=0.9)
                state = place(state, row, settings, np.array([3, 1, 4]))
            last = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, 1)[:, 0]
            active = jnp.arange(rows) != (row + 1) % rows if rows > 1 else jnp.ones(1, bool)
            choice, state = chosen(table[last], state, EVERY, active)
            found.append(int(choice.tokens[row]))
        if rows > 1:
            # one that is not active stands still
            assert int(state.length[(row + 1) % rows]) == 1
        assert state.tokens[row, : 3 + 10].tolist() == [3, 1, 4, *found[wait:]]
        return found[wait:]

    expected = text(1, 0, 0)
    assert len(set(expected)) > 3
    assert text(5, 2, 0) == text(5, 4, 3) == expected


def test_the_best_tokens_are_before_penalties_and_the_best_first(batch):
    logits, _ = batch
    settings = SamplingSettings(temperature=0.0, logprobs=3, logit_bias={int(np.argmin(logits[0])): 100.0})
    features = features_of([settings])
    assert features.top == 5
    choice, _ = chosen(jnp.asarray(logits[:1]), state_of([(settings, [1], [])]), features)
    logprobs = np.log(softmax(logits[0].astype(np.float64)))
    assert choice.top_tokens[0].tolist() == np.argsort(-logprobs)[:5].tolist()
    np.testing.assert_allclose(choice.top_logprobs[0], np.sort(logprobs)[::-1][:5], rtol=1e-5)
    assert int(choice.tokens[0]) == np.argmin(logits[0])
    np.testing.assert_allclose(choice.logprobs[0], logprobs.min(), rtol=1e-5)


def test_a_full_row_grows_no_more():
    state = state_of([(SamplingSettings(temperature=0.0), [1] * ROOM, [])])
    _, after = chosen(jnp.eye(1, VOCAB), state, EVERY)
    assert after.tokens.tolist() == state.tokens.tolist() and after.length.tolist() == [ROOM]


GOLDEN_CASES = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=[case["name"] for case in GOLDEN_CASES])
def test_scores_are_those_of_transformers(case: dict):
    settings = SamplingSettings(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in case["settings"].items()},
        logit_bias={int(token): bias for token, bias in case["logit_bias"].items()},
    )
    logits = np.array(case["logits"], np.float32)
    found = left(jnp.asarray(logits)[None], state_of([(settings, case["prompt"], case["output"])]), EVERY)[0]
    wanted = np.array([-np.inf if score is None else score for score in case["scores"]])
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=2e-6, atol=2e-6)


def test_the_same_inside_the_region_of_a_mesh(batch, rules_for, in_region):
    logits, rows = batch
    state = state_of(rows)
    expected = np.asarray(chosen(jnp.asarray(logits), state, EVERY)[0].tokens)
    with use(rules_for(data=2, fsdp=2, tensor=2)):
        found = in_region(lambda logits, state: choose(logits, state, EVERY)[0].tokens)(jnp.asarray(logits), state)
    # the fixture adds up what each of four devices along data and fsdp has
    assert (np.asarray(found) == 4 * expected).all() and len(set(expected.tolist())) > 5

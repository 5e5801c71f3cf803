"""The next token of each row of a batch, by the settings of the row's own request.

Rules, their order and their details are those of transformers (`generation/logits_process.py`), which has no penalties
by count: they come after that of repetition. What a row draws depends on its logits, its settings, its seed and how
many tokens it has drawn, and on nothing else: neither on other rows nor on the mesh.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from jaxtron.generate.settings import MOST_BIASES, MOST_ENDS, MOST_LOGPROBS, SEEDS, SamplingSettings
from jaxtron.typing import Array, Bool, Float, Int, UInt32

# chosen from logits that are not finite
NO_TOKEN = -1
# how many best tokens are reported: few numbers, for each is a program of its own
TOPS = (0, 1, 5, MOST_LOGPROBS)
# an id beyond every vocabulary, which nothing is written to
_NOWHERE = 2**31 - 1
_WHOLE = ("min_new_tokens", "top_k")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """The settings and tokens of each row; a row's are written by `place`, and tokens added by `choose`."""

    tokens: Int[Array, "B T"]
    """Prompt and output; what follows them means nothing."""
    length: Int[Array, "B"]
    prompt_length: Int[Array, "B"]
    seed: UInt32[Array, "B 2"]
    """The high and the low half."""
    bias_ids: Int[Array, "B N"]
    """Beyond the vocabulary where there are fewer."""
    biases: Float[Array, "B N"]
    repetition_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    ngram_size: Int[Array, "B"]
    ends: Int[Array, "B M"]
    """Beyond the vocabulary where there are fewer."""
    min_new_tokens: Int[Array, "B"]
    temperature: Float[Array, "B"]
    """0 where the best token is taken."""
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    typical_p: Float[Array, "B"]


@dataclass(frozen=True)
class SamplingFeatures:
    """What any row of a batch uses: static, so that a program has no more than that."""

    edits: bool = False
    """Biases, penalties, and ends that are not to come yet."""
    ngrams: bool = False
    draws: bool = False
    cuts: bool = False
    """top_k, top_p or min_p, which sort the vocabulary."""
    typical: bool = False
    top: int = 0
    """How many best tokens are reported."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """The chosen token of each row, and natural logarithms of probabilities before any rule, in float32."""

    tokens: Int[Array, "B"]
    """`NO_TOKEN` where the logits are not finite."""
    logprobs: Float[Array, "B"]
    top_tokens: Int[Array, "B N"]
    """The best first."""
    top_logprobs: Float[Array, "B N"]


def features_of(settings: Iterable[SamplingSettings]) -> SamplingFeatures:
    """What the rows with these settings use."""
    rows = list(settings)
    drawn = [row for row in rows if row.draws]
    wanted = max((row.logprobs or 0 for row in rows), default=0)
    return SamplingFeatures(
        edits=any(
            row.logit_bias
            or row.repetition_penalty != 1
            or row.frequency_penalty
            or row.presence_penalty
            or row.min_new_tokens
            for row in rows
        ),
        ngrams=any(row.no_repeat_ngram_size for row in rows),
        draws=bool(drawn),
        cuts=any(row.top_k or row.top_p < 1 or row.min_p for row in drawn),
        typical=any(row.typical_p < 1 for row in drawn),
        top=next(top for top in TOPS if top >= wanted),
    )


def empty_state(rows: int, room: int) -> SamplingState:
    """Rows that nothing was placed in, each with `room` for so many tokens."""
    row = _row(SamplingSettings(temperature=0.0, seed=0), np.zeros(0, np.int32), room)
    return jax.tree.map(lambda value: jnp.zeros((rows, *value.shape), value.dtype) + value, row)


def place(
    state: SamplingState, row: int, settings: SamplingSettings, prompt: Integer[np.ndarray, "P"]
) -> SamplingState:
    """The state with a request that begins in this row; its seed is given, and there is room for its prompt."""
    return _write(state, jnp.int32(row), _row(settings, prompt, state.tokens.shape[1]))


@jax.jit
def _write(state: SamplingState, row: Int[Array, ""], value: SamplingState) -> SamplingState:
    return jax.tree.map(lambda whole, part: whole.at[row].set(part), state, value)


def _row(settings: SamplingSettings, prompt: Integer[np.ndarray, "P"], room: int) -> SamplingState:
    """One row's state, without its first dimension."""
    assert settings.seed is not None, "`seeded` gives one"
    assert len(prompt) <= room, (len(prompt), room)
    seed = settings.seed % SEEDS
    values = {
        "tokens": _filled(prompt, room),
        "length": np.int32(len(prompt)),
        "prompt_length": np.int32(len(prompt)),
        "seed": np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        "bias_ids": _filled(list(settings.logit_bias), MOST_BIASES, _NOWHERE),
        "biases": _filled(list(settings.logit_bias.values()), MOST_BIASES).astype(np.float32),
        "ngram_size": np.int32(settings.no_repeat_ngram_size),
        "ends": _filled(sorted(set(settings.ends)), MOST_ENDS, _NOWHERE),
        "temperature": np.float32(settings.temperature if settings.draws else 0.0),
    }
    for name in {field.name for field in fields(SamplingState)} - set(values):
        value = getattr(settings, name)
        values[name] = np.int32(value) if name in _WHOLE else np.float32(value)
    return SamplingState(**values)


def _filled(values, length: int, filler: int = 0) -> np.ndarray:
    whole = np.full(length, filler, np.asarray(values).dtype if len(values) else np.int32)
    whole[: len(values)] = values
    return whole if whole.dtype.kind == "f" else whole.astype(np.int32)


def choose(
    logits: Float[Array, "B V"],
    state: SamplingState,
    features: SamplingFeatures,
    active: Bool[Array, "B"] | None = None,
) -> tuple[Choice, SamplingState]:
    """The next token of each row, and the state with it; rows that are not `active` keep theirs.

    `logits` are of the true vocabulary, without padding. Of a row whose rules forbid every token none forbids.
    """
    logits = logits.astype(jnp.float32)
    is_finite = jnp.isfinite(logits).all(1)
    logprobs = jax.nn.log_softmax(logits)
    scores = adjusted(logits, state, features)
    if features.draws:
        # noise by token, so that how a row was cut changes nothing else of its draw
        noise = jax.vmap(partial(_noise, vocab=scores.shape[1]))(state.seed, state.length - state.prompt_length)
        scores += jnp.where(state.temperature[:, None] > 0, noise, 0.0)
    tokens = jnp.argmax(scores, 1).astype(jnp.int32)
    top_logprobs, top_tokens = logprobs[:, :0], jnp.zeros((len(tokens), 0), jnp.int32)
    if features.top:
        top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(features.top, logits.shape[1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], 1)[:, 0]
    choice = Choice(jnp.where(is_finite, tokens, NO_TOKEN), chosen, top_tokens, top_logprobs)
    return choice, _append(state, choice.tokens, active)


def adjusted(logits: Float[Array, "B V"], state: SamplingState, features: SamplingFeatures) -> Float[Array, "B V"]:
    """Logits as all rules leave them, minus infinity where a token is not to be chosen."""
    scores = _edit(logits, state) if features.edits else logits
    if features.ngrams:
        scores = _forbid(scores, _ends_ngram(scores.shape[1], state))
    if not features.draws:
        return scores
    is_drawn = state.temperature[:, None] > 0
    drawn = scores / jnp.where(is_drawn, state.temperature[:, None], 1.0)
    if features.cuts:
        drawn = _cut(drawn, state)
    if features.typical:
        drawn = _cut_untypical(drawn, state)
    return jnp.where(is_drawn, drawn, scores)


def _append(state: SamplingState, tokens: Int[Array, "B"], active: Bool[Array, "B"] | None) -> SamplingState:
    rows, room = state.tokens.shape
    # beyond the room is nowhere
    places = state.length if active is None else jnp.where(active, state.length, room)
    added = state.tokens.at[jnp.arange(rows), places].set(tokens, mode="drop")
    grown = jnp.minimum(state.length + (1 if active is None else active.astype(jnp.int32)), room)
    return replace(state, tokens=added, length=grown)


def _edit(scores: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """Biases, penalties, and no end before its time."""
    vocab = scores.shape[1]
    scores = jax.vmap(lambda row, ids, values: row.at[ids].add(values, mode="drop"))(
        scores, state.bias_ids, state.biases
    )
    places = jnp.arange(state.tokens.shape[1])
    is_known = places < state.length[:, None]
    is_output = is_known & (places >= state.prompt_length[:, None])
    has, count = _counts(state.tokens, is_known, vocab) > 0, _counts(state.tokens, is_output, vocab)
    penalty = state.repetition_penalty[:, None]
    scores = jnp.where(has, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    scores -= state.frequency_penalty[:, None] * count + state.presence_penalty[:, None] * (count > 0)
    is_early = state.length - state.prompt_length < state.min_new_tokens
    ends = jnp.where(is_early[:, None], state.ends, _NOWHERE)
    return _forbid(scores, _marked(ends, jnp.ones(ends.shape, bool), vocab))


def _counts(tokens: Int[Array, "B T"], counted: Bool[Array, "B T"], vocab: int) -> Int[Array, "B V"]:
    def row(tokens: Array, counted: Array) -> Array:
        return jnp.zeros(vocab, jnp.int32).at[tokens].add(counted.astype(jnp.int32), mode="drop")

    return jax.vmap(row)(tokens, counted)


def _marked(tokens: Int[Array, "B T"], marks: Bool[Array, "B T"], vocab: int) -> Bool[Array, "B V"]:
    return _counts(tokens, marks, vocab) > 0


def _ends_ngram(vocab: int, state: SamplingState) -> Bool[Array, "B V"]:
    """The tokens with which the last ones would be a run that was there before."""
    rows, room = state.tokens.shape
    places = jnp.arange(room)
    tokens, length, size = state.tokens, state.length[:, None], state.ngram_size[:, None]

    def step(back: Array, follows: Array) -> Array:
        # does what stands so far before a token equal what stands so far before the next?
        earlier = jnp.take(tokens, places - back, axis=1, mode="clip")
        last = jnp.take_along_axis(tokens, jnp.maximum(length - back, 0), 1)
        is_there = (places >= back) & (length >= back)
        return follows & ((back >= size) | (is_there & (earlier == last)))

    follows = (places < length) & (size > 0)
    follows = jax.lax.fori_loop(1, jnp.minimum(size.max(), room), step, follows)
    return _marked(tokens, follows, vocab)


def _forbid(scores: Float[Array, "B V"], forbidden: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    left = jnp.where(forbidden, -jnp.inf, scores)
    return jnp.where(jnp.isfinite(left).any(1, keepdims=True), left, scores)


def _noise(seed: UInt32[Array, "2"], drawn: Int[Array, ""], *, vocab: int) -> Float[Array, "V"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), drawn)
    return jax.random.gumbel(key, (vocab,), jnp.float32)


def _cut(scores: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """top_k, then top_p among what is left, then min_p among that."""
    vocab = scores.shape[1]
    numbers = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scores.shape)
    # the best first, of equals the first
    negative, order = jax.lax.sort((-scores, numbers), dimension=1, num_keys=1, is_stable=True)
    ranked = -negative
    k = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocab), vocab)[:, None]
    ranked = jnp.where(ranked < jnp.take_along_axis(ranked, k - 1, 1), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked)
    before = jnp.pad(jnp.cumsum(probabilities, 1)[:, :-1], ((0, 0), (1, 0)))
    top_p = state.top_p[:, None]
    kept = (top_p >= 1) | (before < top_p) | (numbers == 0)
    kept &= probabilities >= state.min_p[:, None] * probabilities[:, :1]
    kept &= ranked > -jnp.inf
    # what is kept is a beginning of the ranking: up to this one
    last = kept.sum(1, keepdims=True) - 1
    value, place = jnp.take_along_axis(ranked, last, 1), jnp.take_along_axis(order, last, 1)
    return jnp.where((scores > value) | ((scores == value) & (numbers <= place)), scores, -jnp.inf)


def _cut_untypical(scores: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """The tokens whose information is nearest to what is expected, up to a mass of `typical_p`."""
    logprobs = jax.nn.log_softmax(scores)
    probabilities = jnp.exp(logprobs)
    entropy = -jnp.where(probabilities > 0, logprobs * probabilities, 0.0).sum(1, keepdims=True)
    distance = jnp.abs(-logprobs - entropy)
    ranked, masses = jax.lax.sort((distance, probabilities), dimension=1, num_keys=1, is_stable=True)
    mass = state.typical_p[:, None]
    last = jnp.minimum((jnp.cumsum(masses, 1) < mass).sum(1, keepdims=True), scores.shape[1] - 1)
    limit = jnp.take_along_axis(ranked, last, 1)
    return jnp.where((mass < 1) & (distance > limit), -jnp.inf, scores)

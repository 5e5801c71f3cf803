"""Mixtures of experts: routing, losses and every gradient against each expert on each token in plain JAX."""

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtron.layers.inputs import BranchOutput, LayerInputs
from jaxtron.layers.mlp import gated
from jaxtron.layers.moe.config import MoeConfig
from jaxtron.layers.moe.moe import Moe
from jaxtron.layers.moe.router import LOAD, evened
from jaxtron.layers.moe.sizes import exchange_lines
from jaxtron.models.decoder.stack import Layer, Period
from jaxtron.sharding.rules import current, use

ROWS, LENGTH, WIDTH, HIDDEN = 2, 12, 16, 8
# tokens of each expert in earlier microbatches
BEFORE = np.arange(8, dtype=np.float32) ** 2
TOLERANCE = 2e-5


ACTIVATIONS = {
    "relu": lambda hidden: jax.nn.relu(hidden[..., 0, :]),
    "swiglu": lambda hidden: jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :],
    "clamped_swiglu": lambda hidden: gated("clamped_swiglu", hidden[..., 0, :], hidden[..., 1, :]),
}


def reference(config: MoeConfig, params: dict, x, row_weights, activation: str):
    """(output, loss, choices by expert) of all tokens, in float32 and without parallelism."""
    logits = jnp.einsum("bse,en->bsn", x, params["router"]["kernel"], precision="highest")
    logits += params["router"].get("logit_bias", 0.0)
    scores = jax.nn.sigmoid(logits) if config.scores == "sigmoid" else jax.nn.softmax(logits, -1)
    ranked = np.asarray(jax.lax.stop_gradient(scores))
    if config.groups > 1:
        of_groups = ranked.reshape(ROWS, LENGTH, config.groups, -1)
        count = 1 if config.group_score == "largest" else 2
        best = np.sort(of_groups, -1)[..., -count:].sum(-1)
        limit = np.sort(best, -1)[..., -config.top_groups][..., None]
        ranked = np.where((best >= limit)[..., None], of_groups, -np.inf).reshape(ranked.shape)
    order = np.argsort(-ranked, -1, kind="stable")[..., : config.top_k]
    is_chosen = np.zeros(ranked.shape, bool)
    np.put_along_axis(is_chosen, order, True, -1)
    if config.scores == "topk_softmax":
        weights = jax.nn.softmax(jnp.where(is_chosen, logits, -jnp.inf), -1)
    else:
        weights = jnp.where(is_chosen, scores, 0.0)
        if config.renormalize:
            weights = weights / weights.sum(-1, keepdims=True)
    weights = config.scaling * weights
    counts, known = is_chosen.sum(1), np.asarray(jax.lax.stop_gradient(weights))
    if config.capacity_factor is not None:
        is_kept = np.array(is_chosen)
        for row in range(ROWS):
            for expert in range(config.num_experts):
                tokens = np.flatnonzero(is_chosen[row, :, expert])
                if config.drop == "probability":
                    tokens = tokens[np.argsort(-known[row, tokens, expert], kind="stable")]
                is_kept[row, tokens[config.capacity(LENGTH) :], expert] = False
        weights = jnp.where(is_kept, weights, 0.0)
    hidden = jnp.einsum("bse,negf->bsngf", x, params["up"]) + params.get("up_bias", 0.0)
    inner = ACTIVATIONS[activation](hidden)
    out = jnp.einsum("bsnf,nfe->bsne", inner, params["down"]) + params.get("down_bias", 0.0)
    y = jnp.einsum("bsne,bsn->bse", out, weights)
    if config.shared_size:
        shared = params["shared"]
        pair = jnp.einsum("bse,egf->bsgf", x, shared["up"]["kernel"]) + shared["up"].get("bias", 0.0)
        inner = ACTIVATIONS[activation](pair)
        more = jnp.einsum("bsf,fe->bse", inner, shared["down"]["kernel"]) + shared["down"].get("bias", 0.0)
        if config.shared_gate:
            more *= jax.nn.sigmoid(jnp.einsum("bse,e->bs", x, params["shared_gate"])[..., None])
        y += more
    share = scores / scores.sum(-1, keepdims=True) if config.scores == "sigmoid" else scores
    load = counts
    if config.balance_over != "sequence":
        load = counts.sum(0) + (BEFORE if config.balance_over == "global" else 0.0)
    balance = config.num_experts * (share.mean(1) * load / load.sum(-1, keepdims=True)).sum(-1)
    loss = config.balance * jnp.sum(row_weights * balance)
    loss += config.z_loss * jnp.sum(row_weights * jnp.square(jax.nn.logsumexp(logits, -1)).mean(-1))
    return y, loss, counts.sum(0)


def in_blocks(params: dict) -> dict:
    """Parameters as a step computes with them: those of experts are a block for each device along tensor."""
    layout = PartitionSpec(current().axes("tensor"))
    blocks = (name for name in ("up", "down", "up_bias", "down_bias") if name in params)
    return {**params, **{name: jax.sharding.reshard(params[name][None], layout) for name in blocks}}


CASES = {
    "softmax": {},
    "softmax renormalized": {"renormalize": True, "scaling": 1.5, "z_loss": 0.1},
    "mixtral": {"scores": "topk_softmax", "num_experts": 6},
    "sigmoid, groups": {
        "scores": "sigmoid", "renormalize": True, "scaling": 2.5, "num_experts": 8, "groups": 4, "top_groups": 2,
        "group_score": "two_largest", "top_k": 3,
    },
    "groups by the largest, many rounds": {"groups": 2, "top_groups": 1, "top_k": 3, "slots": 0.1},
    "every expert": {"top_k": 8, "renormalize": True},
    "one expert": {"num_experts": 1, "top_k": 1},
    "load of the step so far": {"balance_over": "global", "num_experts": 8},
    "shared, load of a microbatch": {"shared_size": 12, "balance_over": "microbatch"},
    "shared behind a gate": {"shared_size": 12, "shared_gate": True, "scores": "topk_softmax"},
    "capacity by probability": {"capacity_factor": 0.5},
    "capacity by position": {"capacity_factor": 0.7, "drop": "position", "top_k": 3},
    "no capacity to speak of": {"capacity_factor": 0.01},
    "grouped": {"buckets": "device", "implementation": "reference"},
    "grouped by tiles": {"buckets": "device", "top_k": 3, "implementation": "xla"},
    "grouped, one expert": {"buckets": "device", "num_experts": 1, "top_k": 1},
    "grouped, capacity": {"buckets": "device", "capacity_factor": 0.5},
    "room for all": {"exchange": "capacity", "capacity_factor": 0.7},
    "biases, many rounds": {"bias": True, "slots": 0.1, "shared_size": 12, "z_loss": 0.1},
    "biases, grouped": {"bias": True, "buckets": "device", "implementation": "xla", "scores": "topk_softmax"},
}  # fmt: skip


def make(config: MoeConfig, activation: str) -> Moe:
    settings = {"activation": activation, "bias": config.bias is True, "std": 0.4, "output_std": 0.4, "dropout": 0.0}
    return Moe(WIDTH, HIDDEN, config, **settings, rngs=nnx.Rngs(3))


def with_biases(params: dict) -> dict:
    """None of them 0, those of which there are any."""
    random = np.random.default_rng(1)

    def value(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf + random.standard_normal(leaf.shape, np.float32) if "bias" in path[-1].key else leaf

    return jax.tree.map_with_path(value, params)


# the others are swiglu's
ACTIVATION = {
    "softmax": "relu",
    "mixtral": "relu",
    "biases, many rounds": "clamped_swiglu",
    "biases, grouped": "clamped_swiglu",
}


@pytest.mark.parametrize(
    ("name", "activation"),
    [*((name, ACTIVATION.get(name, "swiglu")) for name in CASES), ("grouped by tiles", "relu")],
)
def test_every_gradient_is_that_of_each_expert_on_each_token(
    rules_for: Callable, in_region: Callable, name: str, activation: str
) -> None:
    config = MoeConfig(**{"balance": 0.3, **CASES[name]})
    random = np.random.default_rng(0)
    x, pull = random.standard_normal((2, ROWS, LENGTH, WIDTH), np.float32)
    row_weights = np.asarray([0.5, 2.0], np.float32)
    with use(rules_for(data=1)):
        graph, state = nnx.split(make(config, activation))
        params = with_biases(nnx.to_pure_dict(state))

        def run(params, x):
            inputs = LayerInputs(row_weights=jnp.asarray(row_weights), load=jnp.asarray(BEFORE[None]))
            output = nnx.merge(graph, in_blocks(params))(x, inputs)
            loss = 0.0 if output.loss is None else output.loss
            return (output.x * pull).sum() + loss, (output.x, loss, output.metrics[LOAD])

        (_, found), gradients = in_region(lambda *given: jax.value_and_grad(run, (0, 1), has_aux=True)(*given))(
            params, x
        )

    def plain(params, x):
        y, loss, counts = reference(config, params, x, row_weights, activation)
        return (y * pull).sum() + loss, (y, loss, counts)

    (_, wanted), expected = jax.value_and_grad(plain, (0, 1), has_aux=True)(params, x)
    for one, other in zip(jax.tree.leaves((found, gradients)), jax.tree.leaves((wanted, expected)), strict=True):
        scale = max(np.abs(other).max(), 1e-3)
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= TOLERANCE * scale


def ran(config: MoeConfig, in_region: Callable, x: np.ndarray, keys: jax.Array | None = None) -> BranchOutput:
    """A layer's output and metrics, without losses; with keys where something is drawn."""
    with_keys = () if keys is None else (jax.random.key_data(keys),)
    graph, state = nnx.split(make(config, "swiglu"))

    def run(params: dict, x: jax.Array, *keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs = LayerInputs(keys=jax.random.wrap_key_data(keys[0])) if keys else LayerInputs()
        output = nnx.merge(graph, in_blocks(params))(x, inputs)
        return output.x, output.metrics

    y, metrics = in_region(run)(nnx.to_pure_dict(state), x, *with_keys)
    return BranchOutput(y, None, metrics)


def tokens(rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, LENGTH, WIDTH), np.float32)


def test_tokens_that_are_dropped_at_random_are_others_in_other_rows(rules_for: Callable, in_region: Callable) -> None:
    config = MoeConfig(capacity_factor=0.5, drop="random", balance=0.0)
    x = np.repeat(tokens(1), ROWS, 0)
    keys = jax.random.split(jax.random.key(0), ROWS)
    with use(rules_for(data=1)):
        found = ran(config, in_region, x, keys)
    assert not np.allclose(found.x[0], found.x[1])
    # of equal rows, so that each expert has as many of both; all that it takes of a sequence are kept
    kept = np.minimum(np.asarray(found.metrics[LOAD]) / ROWS, config.capacity(LENGTH)).sum() * ROWS
    assert 0 < found.metrics["moe/dropped"] == ROWS * LENGTH * config.top_k - kept


@pytest.mark.parametrize("scores", ["softmax", "topk_softmax", "sigmoid"])
def test_entropy_is_that_of_scores_as_a_distribution(rules_for: Callable, in_region: Callable, scores: str) -> None:
    config, x = MoeConfig(scores=scores, balance=0.0), tokens()
    with use(rules_for(data=1)):
        found = ran(config, in_region, x).metrics["moe/entropy"]
        logits = x @ np.asarray(make(config, "swiglu").router.kernel[...])
    raw = 1 / (1 + np.exp(-logits)) if scores == "sigmoid" else np.exp(logits)
    share = raw / raw.sum(-1, keepdims=True)
    assert found == pytest.approx(-(share * np.log(share)).sum(), rel=1e-5)


def test_a_router_of_16_bits_has_logits_of_32(rules_for: Callable, in_region: Callable) -> None:
    """Two experts whose scores 16 bits do not tell apart: the better one is chosen, and not the first."""
    config = MoeConfig(num_experts=2, top_k=1, balance=0.0)
    with use(rules_for(data=1)):
        graph, state = nnx.split(make(config, "swiglu"))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.to_pure_dict(state))
        kernel = np.zeros((WIDTH, 2), np.float32)
        # a sum of 16 ones, and one more by 2^-6 in a number that is 1 there
        kernel[:, 0], kernel[:, 1] = 1.0, 1.0
        kernel[0, 1] += 2.0**-6
        params["router"]["kernel"] = jnp.asarray(kernel, jnp.bfloat16)
        assert (params["router"]["kernel"] == kernel).all()

        def run(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = nnx.merge(graph, in_blocks(params))(x, LayerInputs())
            return output.x.astype(jnp.float32), output.metrics[LOAD]

        _, load = in_region(run)(params, jnp.ones((ROWS, LENGTH, WIDTH), jnp.bfloat16))
    assert jnp.asarray(16 + 2.0**-6, jnp.bfloat16) == 16
    assert load.tolist() == [0, ROWS * LENGTH]


def test_an_expert_takes_no_more_than_a_sequence_has() -> None:
    assert MoeConfig(capacity_factor=1.25).capacity(LENGTH) == 4
    assert MoeConfig(capacity_factor=1e30).capacity(LENGTH) == LENGTH


def test_jitter_moves_the_choice_in_training_alone_and_keeps_the_tokens(
    rules_for: Callable, in_region: Callable
) -> None:
    keys = jax.random.split(jax.random.key(0), ROWS)
    plain, jittered = MoeConfig(jitter=0.0), MoeConfig(jitter=0.5)
    with use(rules_for(data=1)):
        calm, moved, unmoved = (
            ran(config, in_region, tokens(), drawn)
            for config, drawn in ((plain, keys), (jittered, keys), (jittered, None))
        )
    assert calm.metrics[LOAD].sum() == moved.metrics[LOAD].sum()
    assert (calm.metrics[LOAD] != moved.metrics[LOAD]).any()
    # where nothing is drawn, as in validation
    np.testing.assert_array_equal(unmoved.x, calm.x)
    np.testing.assert_array_equal(unmoved.metrics[LOAD], calm.metrics[LOAD])


def test_the_selection_bias_chooses_and_weighs_nothing(rules_for: Callable, in_region: Callable) -> None:
    config = MoeConfig(bias_rate=0.01, top_k=1)
    x = np.random.default_rng(0).standard_normal((ROWS, LENGTH, WIDTH), np.float32)
    with use(rules_for(data=1)):
        graph, state = nnx.split(make(config, "swiglu"))
        params = nnx.to_pure_dict(state)
        bias = np.zeros(config.num_experts, np.float32)
        bias[3] = 2.0
        params["router"]["bias"] = bias

        def run(params, x):
            output = nnx.merge(graph, in_blocks(params))(x, LayerInputs())
            return output.x, output.metrics[LOAD]

        y, load = in_region(run)(params, x)
    # one more than any probability: every token goes there, with the weight that its own score gives
    assert load[3] == ROWS * LENGTH and load.sum() == load[3]
    scores = jax.nn.softmax(x @ params["router"]["kernel"], -1)[..., 3]
    pair = np.einsum("bse,egf->bsgf", x, params["up"][3])
    only = np.einsum("bsf,fe->bse", jax.nn.silu(pair[:, :, 0]) * pair[:, :, 1], params["down"][3])
    np.testing.assert_allclose(y, only * scores[..., None], rtol=1e-4, atol=1e-5)


TILES = "grouped products: xla, as asked"


@pytest.mark.parametrize(
    ("settings", "mesh", "lines"),
    [
        (
            {"buckets": "auto"},
            {"data": 2},
            (
                "experts: 8 on a device, rounds of 16 rows for each (model.moe.slots 1.25)",
                "buckets: expert, where load is even 128 rows to multiply on a device, not the 1,024 of device",
            ),
        ),
        (
            {"buckets": "auto", "implementation": "xla"},
            {"data": 4, "expert": 4},
            (
                "experts: 2 of 8 on a device, rounds of 32 rows for all 2 (model.moe.slots 1.25)",
                "buckets: device, for model.moe.implementation xla",
                TILES,
            ),
        ),
        (
            {"slots": 2.0},
            {"data": 2, "tensor": 2, "expert": 4},
            ("experts: 2 of 8 on a device, rounds of 16 rows for each (model.moe.slots 2)",),
        ),
        (
            {"slots": 100.0},
            {"data": 4, "expert": 4},
            ("experts: 2 of 8 on a device, one round of 48 rows for each (all that can come)",),
        ),
        (
            {"buckets": "device", "implementation": "xla"},
            {"data": 4, "expert": 4},
            ("experts: 2 of 8 on a device, rounds of 32 rows for all 2 (model.moe.slots 1.25)", TILES),
        ),
        (
            {"buckets": "device", "implementation": "xla"},
            {"data": 2},
            ("experts: 8 on a device, one round of 48 tokens with 96 choices for all 8 (all that can come)", TILES),
        ),
        (
            {"exchange": "all_gather"},
            {"data": 4, "expert": 2, "expert_tensor": 2},
            (
                "experts: 4 of 8 on a device, the tokens of 4 devices gathered, rounds of 64 rows for each "
                "(model.moe.slots 1.25)",
            ),
        ),
        (
            {"exchange": "capacity", "capacity_factor": 1.5},
            {"data": 4, "expert": 4},
            (
                "experts: 2 of 8 on a device, one round of 18 rows for each (all that model.moe.capacity_factor 1.5 "
                "lets through)",
            ),
        ),
    ],
)  # fmt: skip
def test_what_is_chosen_is_told(
    rules_for: Callable, settings: dict[str, Any], mesh: dict[str, int], lines: tuple[str, ...]
) -> None:
    with use(rules_for(**mesh)):
        shape = (ROWS, 2 * LENGTH // current().parts("tensor"))
        assert (
            exchange_lines(MoeConfig(**({"buckets": "expert"} | settings)), shape, (WIDTH, 2, HIDDEN), jnp.float32)
            == lines
        )


def test_rows_are_gathered_along_what_lies_first(rules_for: Callable, in_region: Callable) -> None:
    """As XLA lays out arrays for collectives; along another dimension, all that is kept of rows would lie like this."""
    with use(rules_for(data=2, tensor=2, expert=2, expert_tensor=2)):
        graph, state = nnx.split(make(MoeConfig(num_experts=8), "swiglu"))

        def run(params: dict, x: jax.Array) -> jax.Array:
            inputs = LayerInputs(row_weights=jnp.ones(ROWS), load=jnp.asarray(BEFORE[None]))
            block = PartitionSpec(current().axes("tensor"))
            own = {name: jax.sharding.reshard(params[name], block) for name in ("up", "down")}
            return nnx.merge(graph, {**params, **own})(x, inputs).x.sum()

        params, x = nnx.to_pure_dict(state), jnp.ones((ROWS, LENGTH, WIDTH))
        params |= {"up": jnp.ones((2, 4, WIDTH, 2, HIDDEN // 2)), "down": jnp.ones((2, 4, HIDDEN // 2, WIDTH))}
        text = in_region(lambda *given: jax.grad(run, (0, 1))(*given)).lower(params, x).as_text()
    for name in ("all_gather_dim", "scatter_dimension"):
        assert {*re.findall(rf"{name} = (\d+)", text)} == {"0"}


def test_each_layer_of_a_period_gets_its_own_row_of_the_load() -> None:
    seen = []

    def layer(metrics: dict[str, jax.Array]) -> Callable:
        def run(x: jax.Array, inputs: LayerInputs) -> list[BranchOutput]:
            assert inputs.load is not None
            seen.append(inputs.load[:1].tolist())
            return [BranchOutput(x, None, metrics)]

        return Mock(spec=Layer, side_effect=run, can_be_halved=False)

    load, report = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), {LOAD: jnp.zeros(2)}
    period = Mock(spec=Period, layers=[layer({}), layer(report), layer({}), layer(report)])
    output = Period.__call__(period, jnp.zeros((1, 1, 1)), LayerInputs(load=load))
    assert seen == [[[1.0, 2.0]], [[1.0, 2.0]], [[3.0, 4.0]], [[3.0, 4.0]]]
    assert output.metrics[LOAD].shape == (2, 2)


def test_the_selection_bias_rises_where_tokens_are_few() -> None:
    load = np.asarray([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    found = evened(jnp.ones((2, 4)), load, 0.25)
    np.testing.assert_allclose(found, [[0.75, 1.25, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])

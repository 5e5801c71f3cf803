"""Whole decoders against plain JAX, their sizes and their initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.model import Decoder
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.parameters import shardings
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, use

ROWS, LENGTH = 2, 8
GPT2 = ModelConfig(
    num_layers=3,
    hidden_size=16,
    num_heads=4,
    vocab_size=21,
    vocab_multiple=8,
    max_positions=LENGTH + 2,
    activation="gelu_tanh",
)
LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_size=24,
    vocab_size=21,
    vocab_multiple=8,
    activation="swiglu",
    norm="rms_norm",
    norm_epsilon=1e-6,
    bias=False,
    position="rotary",
    tied_head=False,
    z_loss=0.01,
)


def make_params(plan):
    generator = np.random.default_rng(0)
    values = jax.tree.map(
        lambda spec: (0.3 * generator.normal(size=spec.shape) + (spec.role == "scale")).astype(np.float32),
        plan.parameters,
    )
    return jax.device_put(values, shardings(plan.parameters))


def on_host(params):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)


def make_batch():
    generator = np.random.default_rng(1)
    tokens, targets = generator.integers(0, 21, (2, ROWS, LENGTH))
    return tokens, targets, generator.random((ROWS, LENGTH)).astype(np.float32)


def in_region(function):
    """As in the train step: batch axes manual."""

    def local(*arrays):
        outputs = function(*jax.tree.map(vary, arrays))
        return jax.tree.map(lambda array: all_reduce(vary(array), current().manual), outputs)

    whole = PartitionSpec()
    return jax.jit(region(local, whole, whole))


def causal_attention(query, key, value):
    """Heads all alike, [row, position, head, dim]."""
    scores = jnp.einsum("bshd,bthd->bhst", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(np.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), value)


def gpt2_logits(params, tokens):
    """GPT-2: pre-norm layers, learned positions, tied head."""

    def linear(layer, x, equation):
        return jnp.einsum(equation, x, layer["kernel"]) + layer["bias"]

    def layer_norm(norm, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]

    table, positions = params["embedding"]["table"], params["embedding"]["positions"]
    x = table[tokens] + positions[: tokens.shape[1]]
    for number in range(GPT2.num_layers):
        first, second = (
            jax.tree.map(lambda leaf: leaf[number], params["stack"]["periods"]["layers"][place])  # noqa: B023
            for place in (0, 1)
        )
        normed, attention = layer_norm(first["norm"], x), first["attention"]
        heads = [linear(attention[name], normed, "bse,ehd->bshd") for name in ("query", "key", "value")]
        x = x + linear(attention["output"], causal_attention(*heads), "bshd,hde->bse")
        hidden = jax.nn.gelu(
            linear(second["mlp"]["up"], layer_norm(second["norm"], x), "bse,ef->bsf"), approximate=True
        )
        x = x + linear(second["mlp"]["down"], hidden, "bsf,fe->bse")
    return layer_norm(params["final_norm"], x) @ table.T


def llama_logits(params, tokens):
    """Llama: RMSNorm, rotary, grouped heads, SwiGLU, a head of its own, no biases."""

    def rms_norm(norm, x):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"]

    def rotate(x):
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None].astype(np.complex64)
        return jnp.concatenate([turned.real, turned.imag], -1)

    x = params["embedding"]["table"][tokens]
    for number in range(LLAMA.num_layers):
        first, second = (
            jax.tree.map(lambda leaf: leaf[number], params["stack"]["periods"]["layers"][place])  # noqa: B023
            for place in (0, 1)
        )
        normed, attention = rms_norm(first["norm"], x), first["attention"]
        query, key, value = (
            jnp.einsum("bse,ehd->bshd", normed, attention[name]["kernel"]) for name in ("query", "key", "value")
        )
        # queries 0 and 1 read the first key/value head, 2 and 3 the second
        key, value = jnp.repeat(rotate(key), 2, 2), jnp.repeat(value, 2, 2)
        mixed = causal_attention(rotate(query), key, value)
        x = x + jnp.einsum("bshd,hde->bse", mixed, attention["output"]["kernel"])
        both = jnp.einsum("bse,egf->bsgf", rms_norm(second["norm"], x), second["mlp"]["up"]["kernel"])
        x = x + (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ second["mlp"]["down"]["kernel"]
    return rms_norm(params["final_norm"], x) @ params["head"]["table"].T


FAMILIES = {"gpt2": (GPT2, gpt2_logits), "llama": (LLAMA, llama_logits)}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_plain_jax(rules_for, family):
    config, logits = FAMILIES[family]
    tokens, *_ = make_batch()
    with use(rules_for(data=1)):
        plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))
        params = make_params(plan)
        result = in_region(lambda params, tokens: plan.module(params).logits(tokens))(params, tokens)
    assert result.shape == (ROWS, LENGTH, config.padded_vocab)
    np.testing.assert_allclose(result, logits(on_host(params), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_plain_jax(rules_for, family):
    config, logits = FAMILIES[family]
    batch = make_batch()
    with use(rules_for(data=1)):
        plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))
        params = make_params(plan)
        run = jax.value_and_grad(lambda params, *batch: plan.module(params).loss(*batch), has_aux=True)
        (total, nll), gradients = in_region(run)(params, *batch)

    def plain(params, tokens, targets, weights):
        # the vocabulary's padding is no token
        scores = logits(params, tokens)[..., : config.vocab_size]
        log_z = jax.nn.logsumexp(scores, -1)
        nll = log_z - jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
        return (weights * (nll + config.z_loss * log_z**2)).sum(), (weights * nll).sum()

    (expected_total, expected_nll), expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(on_host(params), *batch)
    np.testing.assert_allclose([total, nll], [expected_total, expected_nll], rtol=1e-5)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(expected)))
    for (path, one), other in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        # the gradient of GPT-2's key bias is zero but for rounding
        largest = max(np.abs(other).max(), 1e-3 * norm)
        assert np.abs(one - other).max() < 2e-5 * largest, jax.tree_util.keystr(path)


# Megatron's own tests: GPT of 2 layers, width 12, 4 heads, vocabulary 100, 4 positions
TINY = dict(hidden_size=12, num_heads=4, vocab_size=100, vocab_multiple=1)


def count(config):
    plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))
    return plan, plan.num_parameters


def test_parameters_are_as_many_as_megatron_counts(rules_for):
    with use(rules_for(data=1)):
        plan, total = count(ModelConfig(num_layers=2, max_positions=4, tied_head=False, **TINY))
        sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in plan.parameters.items()}
        assert sizes == {"embedding": 1248, "stack": 2 * 1884, "final_norm": 24, "head": 1200}
        assert total == 6240
        layers = plan.parameters["stack"]["periods"]["layers"]
        parts = {name: part for layer in layers.values() for name, part in layer.items() if name != "norm"}
        sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) // 2 for name, part in parts.items()}
        # with its norm, as Megatron's fused layer counts it, attention has 648 + 24
        assert sizes == {"attention": 4 * 12 * 12 + 4 * 12, "mlp": 1212}


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({"tied_head": True}, 5040),
        ({"tied_head": False, "vocab_multiple": 128}, 6240 + 2 * 28 * 12),
        # no biases, of LayerNorms neither
        ({"tied_head": False, "bias": False}, 6240 - 2 * (48 + 48 + 12 + 2 * 12) - 12),
        ({"tied_head": False, "bias": False, "qkv_bias": True}, 6240 - 2 * (12 + 48 + 12 + 2 * 12) - 12),
        # a key/value head less is 2 x 3 x 12 weights and 2 x 3 biases less, in each layer
        ({"tied_head": False, "num_kv_heads": 1}, 6240 - 2 * 3 * (2 * 3 * 12 + 2 * 3)),
        # scales and biases of queries and keys, of a head's size
        ({"tied_head": False, "qk_norm": True}, 6240 + 2 * 2 * 2 * 3),
        ({"tied_head": False, "embedding_norm": True}, 6240 + 24),
        # a norm less in each layer
        ({"tied_head": False, "pattern": "(*-)"}, 6240 - 2 * 24),
        ({"tied_head": False, "position": "none"}, 6240 - 48),
    ],
    ids=str,
)
def test_parameters_of_variants(rules_for, changes, total):
    settings = {**TINY, "num_layers": 2, **changes}
    if settings.get("position") is None:
        settings["max_positions"] = 4
    with use(rules_for(data=1)):
        assert count(ModelConfig(**settings))[1] == total


def test_initial_values(rules_for):
    config = ModelConfig(
        num_layers=8, hidden_size=64, num_heads=4, vocab_size=256, max_positions=64, tied_head=False, initial_std=0.05
    )
    with use(rules_for(data=1)):
        plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))
        params = plan.initialize(jax.random.key(0))
    for (path, leaf), role in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(plan.roles), strict=True):
        name, values = jax.tree_util.keystr(path), np.asarray(leaf)
        if role in ("bias", "scale"):
            assert np.all(values == (role == "scale")), name
        else:
            # GPT-2 and Megatron: projections back to the stream by 1 / sqrt(2 x layers)
            std = 0.05 / 4 if "output" in name or "down" in name else 0.05
            assert values.std() == pytest.approx(std, rel=0.05), name
            assert abs(values.mean()) < 5 * std / values.size**0.5, name
        if role == "kernel":
            assert len({layer.tobytes() for layer in values}) == 8, name


def test_layers_apply_in_order_whether_scanned_or_not(rules_for):
    tokens, *_ = make_batch()
    results = []
    for unroll in (1, 3):
        config = GPT2.model_copy(update={"unroll": unroll})
        with use(rules_for(data=1)):
            plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))  # noqa: B023
            params = make_params(plan)
            results.append(in_region(lambda params, tokens: plan.module(params).logits(tokens))(params, tokens))  # noqa: B023
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def test_dropout_only_with_keys(rules_for):
    tokens, *_ = make_batch()
    keys = jax.random.split(jax.random.key(0), ROWS)
    with use(rules_for(data=1)):
        config = GPT2.model_copy(update={"dropout": 0.2, "attention_dropout": 0.2, "unroll": 1})
        plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))
        params = make_params(plan)
        run = in_region(lambda params, tokens, keys: plan.module(params)._through_layers(tokens, keys))
        quiet = in_region(lambda params, tokens: plan.module(params)._through_layers(tokens))(params, tokens)
        one, again = run(params, tokens, keys), run(params, tokens, keys)
        other = run(params, tokens, keys[::-1])
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, quiet, atol=1e-2) and not np.allclose(one, other, atol=1e-2)

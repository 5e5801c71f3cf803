"""Whole decoders against plain JAX, their sizes and their initial values."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.data.batch import TokenBatch
from jaxtron.data.config import DataConfig
from jaxtron.generate.sample import sample
from jaxtron.kernels.attention.dropout import kept
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.program import make_parts
from jaxtron.run.configuration import Configuration, TrainConfig
from jaxtron.run.session import make_trainer
from jaxtron.sharding.parameters import shardings
from jaxtron.sharding.rules import use

ROWS, LENGTH = 2, 8
RATE = 0.2
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


def make_batch(packed=False):
    """Random tokens of uneven weights; `packed`: two documents a row, positions starting again."""
    generator = np.random.default_rng(1)
    tokens, targets = generator.integers(0, 21, (2, ROWS, LENGTH), dtype=np.int32)
    batch = TokenBatch(tokens, targets, generator.random((ROWS, LENGTH)).astype(np.float32))
    if not packed:
        return batch
    cuts = np.array([3, 5])[:, None]
    segments = (np.arange(LENGTH) >= cuts).astype(np.int32)
    positions = (np.arange(LENGTH) - cuts * segments).astype(np.int32)
    return replace(batch, segments=segments, positions=positions)


def trainer_of(model):
    """What trains such a model on the current mesh."""
    train = TrainConfig(global_batch=ROWS, precision="fp32")
    return make_trainer(Configuration(model=model, train=train, data=DataConfig(sequence_length=LENGTH)))


def trained(rules_for, config, batch, step=0):
    """Loss and gradients of a step on one device, and the parameters."""
    with use(rules_for(data=1)):
        trainer = trainer_of(config)
        params = make_params(trainer.blueprint)
        metrics, gradients = jax.jit(trainer.loss_and_gradients)(params, batch, jnp.int32(step), jnp.float32(1))
    return float(metrics["loss"]), gradients, on_host(params)


def causal_attention(query, key, value, batch, drop=lambda probabilities: probabilities):
    """Heads all alike, [row, position, head, dim]; of a packed row, documents alone."""
    scores = jnp.einsum("bshd,bthd->bhst", query, key) / query.shape[-1] ** 0.5
    segments = np.zeros_like(batch.tokens) if batch.segments is None else batch.segments
    seen = np.tri(scores.shape[-1], dtype=bool) & (segments[:, :, None] == segments[:, None])
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    return jnp.einsum("bhst,bthd->bshd", drop(jax.nn.softmax(scores)), value)


def positions_of(batch):
    return np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH)) if batch.positions is None else batch.positions


def gpt2_logits(params, batch, key=None):
    """GPT-2: pre-norm layers, learned positions, tied head; with a key, dropout of `RATE`."""

    share = round(RATE * 65536)

    def bits(shape, dtype, *sites):
        keys = [functools.reduce(jax.random.fold_in, (row, *sites), key) for row in range(ROWS)]
        return jnp.stack([jax.random.bits(one, shape, dtype) for one in keys])

    def drop(x, *sites):
        if key is None:
            return x
        return jnp.where(bits(x.shape[1:], jnp.uint16, *sites) >= share, x / (1 - share / 65536), 0)

    def drop_probabilities(x, *sites):
        if key is None:
            return x
        seeds = bits((x.shape[1], 2), jnp.uint32, *sites)
        mask = kept(AttentionSpec(dropout_rate=RATE, dropout_seeds=seeds), *x.shape[2:])
        return jnp.where(mask, x / (1 - share / 65536), 0)

    def linear(layer, x, equation):
        return jnp.einsum(equation, x, layer["kernel"]) + layer["bias"]

    def layer_norm(norm, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]

    table, positions = params["embedding"]["table"], params["embedding"]["positions"]
    x = drop(table[batch.tokens] + positions[positions_of(batch)], GPT2.num_layers)
    for number in range(GPT2.num_layers):
        first, second = (
            jax.tree.map(lambda leaf: leaf[number], params["stack"]["periods"]["layers"][place])  # noqa: B023
            for place in (0, 1)
        )
        normed, attention = layer_norm(first["norm"], x), first["attention"]
        heads = [linear(attention[name], normed, "bse,ehd->bshd") for name in ("query", "key", "value")]
        mixed = causal_attention(*heads, batch, lambda x: drop_probabilities(x, number, 0, 0, 1))  # noqa: B023
        x = x + drop(linear(attention["output"], mixed, "bshd,hde->bse"), number, 0, 0)
        hidden = jax.nn.gelu(
            linear(second["mlp"]["up"], layer_norm(second["norm"], x), "bse,ef->bsf"), approximate=True
        )
        x = x + drop(linear(second["mlp"]["down"], hidden, "bsf,fe->bse"), number, 1, 0)
    return layer_norm(params["final_norm"], x) @ table.T


def llama_logits(params, batch):
    """Llama: RMSNorm, rotary, grouped heads, SwiGLU, a head of its own, no biases."""

    def rms_norm(norm, x):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"]

    def rotate(x):
        half = x.shape[-1] // 2
        angles = positions_of(batch)[..., None] * 10000.0 ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None].astype(np.complex64)
        return jnp.concatenate([turned.real, turned.imag], -1)

    x = params["embedding"]["table"][batch.tokens]
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
        mixed = causal_attention(rotate(query), key, value, batch)
        x = x + jnp.einsum("bshd,hde->bse", mixed, attention["output"]["kernel"])
        both = jnp.einsum("bse,egf->bsgf", rms_norm(second["norm"], x), second["mlp"]["up"]["kernel"])
        x = x + (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ second["mlp"]["down"]["kernel"]
    return rms_norm(params["final_norm"], x) @ params["head"]["table"].T


FAMILIES = {"gpt2": (GPT2, gpt2_logits), "llama": (LLAMA, llama_logits)}


def check(found, plain, params, batch):
    """Loss and every gradient of a step against those of a function of parameters and batch in plain JAX."""

    def mean(params):
        sums = plain(params, batch)
        return tuple(total / batch.weights.sum() for total in sums)

    (_, expected_nll), expected = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    loss, gradients = found
    assert loss == pytest.approx(float(expected_nll), rel=1e-5)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(expected)))
    for (path, one), other in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        # the gradient of GPT-2's key bias is zero but for rounding
        largest = max(np.abs(other).max(), 1e-3 * norm)
        assert np.abs(one - other).max() < 2e-5 * largest, jax.tree_util.keystr(path)


def plain_loss(config, logits):
    """Sums over the batch, in plain JAX, of the training loss and of the negative log-likelihood."""

    def plain(params, batch):
        # the vocabulary's padding is no token
        scores = logits(params, batch)[..., : config.vocab_size]
        log_z = jax.nn.logsumexp(scores, -1)
        nll = log_z - jnp.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
        return (batch.weights * (nll + config.z_loss * log_z**2)).sum(), (batch.weights * nll).sum()

    return plain


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_plain_jax(rules_for, family, packed):
    config, logits = FAMILIES[family]
    batch = make_batch(packed)
    loss, gradients, params = trained(rules_for, config, batch)
    check((loss, gradients), plain_loss(config, logits), params, batch)


def test_dropout_equals_plain_jax(rules_for):
    config, batch = GPT2.model_copy(update={"dropout": RATE, "attention_dropout": RATE}), make_batch()
    loss, gradients, params = trained(rules_for, config, batch, step=3)
    key = jax.random.fold_in(jax.random.key(Configuration().seed), 3)
    plain = plain_loss(config, functools.partial(gpt2_logits, key=key))
    check((loss, gradients), plain, params, batch)


def test_the_next_token_is_the_likeliest_by_plain_jax(rules_for):
    prompt = make_batch().tokens[0, : LENGTH - 3]
    with use(rules_for(data=1)):
        trainer = trainer_of(LLAMA)
        params = make_params(trainer.blueprint)
        settings = {"num_tokens": 3, "window": LENGTH, "vocab": LLAMA.vocab_size, "temperature": 1e-4}
        found = sample(trainer, params, prompt, **settings).tolist()
    row, expected = prompt.tolist(), []
    for _ in range(3):
        tokens = np.array([row + [0] * (LENGTH - len(row))] * ROWS, np.int32)
        scores = llama_logits(on_host(params), TokenBatch(tokens, tokens, np.ones(tokens.shape, np.float32)))
        expected.append(int(scores[0, len(row) - 1, : LLAMA.vocab_size].argmax()))
        row.append(expected[-1])
    assert found == expected


# Megatron's own tests: GPT of 2 layers, width 12, 4 heads, vocabulary 100, 4 positions
TINY = dict(hidden_size=12, num_heads=4, vocab_size=100, vocab_multiple=1)


def count(config):
    plan = make_parts(config, "float32").blueprint
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
        ({"tied_head": False, "bias": False, "norm_bias": True}, 6240 - 2 * (48 + 48 + 12)),
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
        plan = make_parts(config, "float32").blueprint
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
    batch = make_batch()
    one, three = (trained(rules_for, GPT2.model_copy(update={"unroll": unroll}), batch)[:2] for unroll in (1, 3))
    assert one[0] == pytest.approx(three[0], rel=1e-6)
    jax.tree.map(lambda one, three: np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-5), one[1], three[1])


def test_dropout_draws_anew_each_step_and_only_in_training(rules_for):
    config, batch = GPT2.model_copy(update={"dropout": 0.2, "attention_dropout": 0.2}), make_batch()
    quiet = trained(rules_for, GPT2, batch)[0]
    one, again, other = (trained(rules_for, config, batch, step)[0] for step in (1, 1, 2))
    assert one == again and len({round(loss, 3) for loss in (one, other, quiet)}) == 3
    with use(rules_for(data=1)):
        trainer = trainer_of(config)
        sums, counts = jax.jit(trainer.evaluate)(make_params(trainer.blueprint), batch)
    assert float(sums["loss"] / counts["tokens"]) == pytest.approx(quiet, rel=1e-5)

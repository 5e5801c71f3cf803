"""Attention against loops over rows, heads and positions in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtron.kernels.attention import chunked, materialized
from jaxtron.kernels.attention import reference as plain_attention
from jaxtron.kernels.attention.attention import attention
from jaxtron.kernels.attention.dropout import kept
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.layers.attention import Attention, Core
from jaxtron.layers.config import RotaryConfig
from jaxtron.layers.inputs import LayerInputs, row_keys
from jaxtron.layers.norm import Norm
from jaxtron.layers.positions import alibi_slopes, rotary_tables
from jaxtron.sharding.rules import constrain, use

ROWS, LENGTH, EMBED, HEADS, HEAD_DIM = 2, 7, 24, 4, 8


def make_attention(num_kv_heads=HEADS, *, bias=True, qk_norm=False, alibi=False, rate=0.0, dropout=0.0):
    """Attention with random values for every parameter, biases and scales included."""
    rngs = nnx.Rngs(0)
    norm = functools.partial(Norm, HEAD_DIM, kind="layer_norm", bias=True, epsilon=1e-5, rngs=rngs)
    module = Attention(
        EMBED,
        num_heads=HEADS,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=(lambda heads: norm()) if qk_norm else None,
        rotated=None,
        alibi=alibi,
        sinks=False,
        core=Core(materialized, AttentionSpec(dropout_rate=rate)),
        std=0.3,
        output_std=0.3,
        dropout=dropout,
        rngs=rngs,
    )
    graph, state = nnx.split(module)
    generator = np.random.default_rng(1)
    state = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32) * 0.5, state)
    return nnx.merge(graph, state)


def make_input(seed=2):
    return np.random.default_rng(seed).normal(size=(ROWS, LENGTH, EMBED)).astype(np.float32)


def read(variable):
    return np.asarray(variable[...], np.float64)


def linear(layer, x, equation):
    y = np.einsum(equation, x, read(layer.kernel))
    return y if layer.bias is None else y + read(layer.bias)


def layer_norm(norm, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * read(norm.scale) + read(norm.bias)


def rotate_pairs(x, frequencies):
    """Each pair (i, i + half) of the first dimensions as a complex number, turned by its angle."""
    half = len(frequencies)
    turns = np.exp(1j * np.arange(x.shape[1])[:, None] * frequencies)[:, None]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turns
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)


def reference(module, x, *, slopes=None, frequencies=None):
    x = np.asarray(x, np.float64)
    query, key, value = (linear(layer, x, "bse,ehd->bshd") for layer in (module.query, module.key, module.value))
    if module.query_norm is not None:
        query, key = layer_norm(module.query_norm, query), layer_norm(module.key_norm, key)
    if frequencies is not None:
        query, key = rotate_pairs(query, frequencies), rotate_pairs(key, frequencies)
    mixed = np.zeros_like(query)
    group = HEADS // key.shape[2]
    for row, head, position in np.ndindex(ROWS, HEADS, LENGTH):
        seen = key[row, : position + 1, head // group]
        scores = seen @ query[row, position, head] / np.sqrt(HEAD_DIM)
        if slopes is not None:
            scores = scores - slopes[head] * (position - np.arange(position + 1))
        weights = np.exp(scores - scores.max())
        mixed[row, position, head] = weights / weights.sum() @ value[row, : position + 1, head // group]
    return linear(module.output, mixed, "bshd,hde->bse")


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("bias", [True, False])
def test_heads_and_biases(rules_for, num_kv_heads, bias):
    with use(rules_for(data=1)):
        module, x = make_attention(num_kv_heads, bias=bias), make_input()
        np.testing.assert_allclose(module(x, LayerInputs()), reference(module, x), rtol=1e-4, atol=1e-5)


def test_norms_of_queries_and_keys(rules_for):
    with use(rules_for(data=1)):
        module, x = make_attention(2, qk_norm=True), make_input()
        np.testing.assert_allclose(module(x, LayerInputs()), reference(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_alibi(rules_for, num_kv_heads):
    with use(rules_for(data=1)):
        module, x = make_attention(num_kv_heads, alibi=True), make_input()
        expected = reference(module, x, slopes=alibi_slopes(HEADS))
        np.testing.assert_allclose(module(x, LayerInputs()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary(rules_for, fraction):
    rotated = int(HEAD_DIM * fraction)
    with use(rules_for(data=1)):
        module, x = make_attention(2), make_input()
        module.rotated = ("rotary", rotated)
        tables = {module.rotated: rotary_tables(RotaryConfig(base=100.0), rotated, jnp.arange(LENGTH))}
        expected = reference(module, x, frequencies=100.0 ** (-np.arange(0, rotated, 2) / rotated))
        np.testing.assert_allclose(module(x, LayerInputs(rotary=tables)), expected, rtol=1e-4, atol=1e-5)


def test_no_position_sees_a_later_one(rules_for):
    with use(rules_for(data=1)):
        module, x = make_attention(), make_input()
        changed = x.copy()
        changed[:, 4:] = make_input(3)[:, 4:]
        before, after = module(x, LayerInputs()), module(changed, LayerInputs())
        np.testing.assert_array_equal(before[:, :4], after[:, :4])
        assert not np.allclose(before[:, 4:], after[:, 4:])


def test_scores_are_float32_inside_bfloat16(rules_for):
    # scores of 512 and 513, one and the same in bfloat16, weigh e times differently
    with use(rules_for(data=1)):
        query = jnp.full((1, 2, 1, 4), 32.0, jnp.bfloat16)
        key = jnp.asarray([[8.0, 8, 8, 8], [8, 8, 8, 8.0625]], jnp.bfloat16).reshape(1, 2, 1, 4)
        value = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 4), jnp.bfloat16)
        mixed = Core(materialized)(query, key, value, None, None, LayerInputs())
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(mixed[0, 1, 0], np.float32), np.e / (1 + np.e), rtol=1e-2)


def test_dropped_probabilities_keep_their_expectation(rules_for):
    rate, rows = 0.25, 512
    with use(rules_for(data=1)):
        core = Core(materialized, AttentionSpec(dropout_rate=rate))
        generator = np.random.default_rng(0)
        query, key, value = (jnp.asarray(generator.normal(size=(1, 5, 2, 4)), jnp.float32) for _ in range(3))
        many = [jnp.broadcast_to(array, (rows, *array.shape[1:])) for array in (query, key, value)]
        keys = row_keys(jax.random.key(0), np.arange(rows))
        mixed = np.asarray(core(*many, None, None, LayerInputs(keys=keys)))
        whole = np.asarray(core(query, key, value, None, None, LayerInputs()))[0]
        # the first position has one key, of probability 1, kept or dropped
        first = np.asarray(value)[0, 0] / (1 - rate)
    dropped = np.isclose(mixed[:, 0], 0).all(-1)
    assert np.all(dropped | np.isclose(mixed[:, 0], first).all(-1))
    assert dropped.mean() == pytest.approx(rate, abs=0.05)
    np.testing.assert_allclose(mixed.mean(0), whole, atol=6 * mixed.std(0).max() / rows**0.5)


def test_a_row_with_the_same_key_has_the_same_masks(rules_for):
    with use(rules_for(data=1)):
        module = make_attention(rate=0.3, dropout=0.3)
        x = np.concatenate([make_input()[:1]] * 3)
        keys = row_keys(jax.random.key(0), np.array([5, 6, 5]))
        y = np.asarray(module(x, LayerInputs(keys=keys)))
    np.testing.assert_array_equal(y[0], y[2])
    assert not np.array_equal(y[0], y[1])


def make_heads(num_kv_heads, length=LENGTH):
    """Queries, keys, values and the cotangent of what is mixed of them."""
    generator = np.random.default_rng(4)
    counts = (HEADS, num_kv_heads, num_kv_heads, HEADS)
    return [jnp.asarray(generator.normal(size=(ROWS, length, count, HEAD_DIM)), jnp.float32) for count in counts]


def mix_plainly(query, key, value, slopes, keep):
    """The core in jnp, with `keep` [rows, heads, queries, keys] times the probabilities."""
    key, value = (jnp.repeat(array, HEADS // array.shape[2], 2) for array in (key, value))
    scores = jnp.einsum("bshd,bthd->bhst", query, key) / HEAD_DIM**0.5
    distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
    scores = jnp.where(distance >= 0, scores - slopes[:, None, None] * distance, -jnp.inf)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores, -1) * keep, value)


@pytest.mark.parametrize(
    ("num_kv_heads", "alibi", "rate"), [(4, False, 0.0), (4, True, 0.4), (2, True, 0.0), (1, False, 0.4)]
)
def test_gradients_of_the_core(rules_for, num_kv_heads, alibi, rate):
    *heads, cotangent = make_heads(num_kv_heads)

    def gradients(core):
        def loss(*heads):
            mixed = core(*heads)
            return jnp.sum(mixed * cotangent), mixed

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*heads)

    slopes = alibi_slopes(HEADS) if alibi else None
    with use(rules_for(data=1)):
        inputs = LayerInputs(keys=row_keys(jax.random.key(0), np.arange(ROWS)))
        core = Core(materialized, AttentionSpec(dropout_rate=rate))
        found, mixed = gradients(
            lambda *heads: core(*heads, None if slopes is None else jnp.asarray(slopes), None, inputs)
        )
    seeds = jnp.stack([jax.random.bits(key, (HEADS, 2), jnp.uint32) for key in inputs.fold(1).keys])
    mask = kept(AttentionSpec(dropout_rate=rate, dropout_seeds=seeds), LENGTH, LENGTH)
    keep = 1.0 if mask is None else np.asarray(mask) / (1 - rate)
    assert rate == 0 or 0 < np.mean(keep == 0) < 1
    plain = functools.partial(mix_plainly, slopes=np.zeros(HEADS) if slopes is None else slopes, keep=keep)
    all_expected, expected_mixed = gradients(plain)
    # the rate is drawn from 16 bits
    np.testing.assert_allclose(mixed, expected_mixed, rtol=1e-4, atol=1e-5)
    for name, gradient, expected in zip(("query", "key", "value"), found, all_expected, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def test_gradients_in_bfloat16_are_as_good_as_its_probabilities(rules_for):
    *heads, cotangent = make_heads(2, length=64)
    with use(rules_for(data=1)):

        def gradients(dtype):
            def loss(*heads):
                mixed = Core(materialized)(*heads, None, None, LayerInputs())
                return jnp.sum(mixed.astype(jnp.float32) * cotangent)

            return jax.grad(loss, argnums=(0, 1, 2))(*(array.astype(dtype) for array in heads))

        for name, found, exact in zip("qkv", gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
            assert found.dtype == jnp.bfloat16
            error = jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
            # inputs and outputs alone are rounded by 2^-9 each
            assert error < 2**-7, (name, error)


@pytest.mark.parametrize("implementation", [materialized, chunked], ids=["materialized", "xla"])
def test_gradients_do_not_depend_on_the_mesh(rules_for, in_region, implementation):
    *heads, cotangent = make_heads(2)
    keys = row_keys(jax.random.key(0), np.arange(ROWS))

    def gradients(keys, cotangent, *heads):
        heads = [constrain(array, "batch", "full_seq", "heads", "head_dim") for array in heads]
        cotangent = constrain(cotangent, "batch", "full_seq", "heads", "head_dim")
        inputs = LayerInputs(keys=keys)
        core = Core(implementation, AttentionSpec(dropout_rate=0.3))
        found = jax.vjp(lambda *heads: core(*heads, None, None, inputs), *heads)[1](cotangent)
        return [jax.sharding.reshard(gradient, PartitionSpec()) for gradient in found]

    results = []
    for tensor in (1, 2):
        with use(rules_for(data=1, tensor=tensor)):
            results.append(in_region(gradients)(keys, cotangent, *heads))
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{"window": 3}, {}, {"window": 2, "logits_scale": 0.7}], ids=str)
def test_windows_and_documents(rules_for, fields):
    spec = AttentionSpec(**fields)
    *heads, cotangent = make_heads(2)
    segments = jnp.asarray(np.sort(np.random.default_rng(5).integers(0, 3, (ROWS, LENGTH))), jnp.int32)

    def gradients(core):
        mixed, pull = jax.vjp(core, *heads)
        return mixed, *pull(jax.sharding.reshard(cotangent, jax.typeof(mixed).sharding))

    packed = dataclasses.replace(spec, q_segment_ids=segments, kv_segment_ids=segments)
    with use(rules_for(data=1)):
        core = Core(materialized, spec)
        found = gradients(lambda *heads: core(*heads, None, None, LayerInputs(segments=segments)))
        expected = gradients(lambda *heads: attention(*heads, packed, plain_attention)[0])
    for name, one, two in zip(("out", "query", "key", "value"), found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5, err_msg=name)

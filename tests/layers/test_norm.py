"""Norms against their formulas, and their precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtron.layers.norm import HeadNorm, Norm
from jaxtron.sharding.rules import use

SIZE, EPSILON = 16, 1e-3


def make_norm(kind, bias=True):
    norm = Norm(SIZE, kind=kind, bias=bias, epsilon=EPSILON, rngs=nnx.Rngs(0))
    norm.scale[...] = norm.scale[...] + np.linspace(-0.5, 0.5, SIZE)
    if norm.bias is not None:
        norm.bias[...] = norm.bias[...] + np.linspace(2, 3, SIZE)
    return norm


def make_input():
    # means and sizes that differ by row, one of them comparable to epsilon
    generator = np.random.default_rng(0)
    return (generator.normal(size=(3, 4, SIZE)) * np.array([0.02, 1, 50])[:, None, None] + 2).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["layer_norm", "layer_norm_1p", "rms_norm", "rms_norm_1p"])
def test_formula(rules_for, kind, bias):
    with use(rules_for(data=1)):
        norm = make_norm(kind, bias)
        y = norm(make_input())
    x = make_input().astype(np.float64)
    gamma, beta = 1 + np.linspace(-0.5, 0.5, SIZE), np.linspace(2, 3, SIZE) if bias else 0
    if kind.startswith("rms_norm"):
        assert norm.bias is None
        expected = gamma * x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
    else:
        expected = gamma * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON) + beta
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "stored"), [("layer_norm", 1), ("layer_norm_1p", 0), ("rms_norm", 1), ("rms_norm_1p", 0)]
)
def test_initial_scale(rules_for, kind, stored):
    with use(rules_for(data=1)):
        norm = Norm(SIZE, kind=kind, bias=True, epsilon=EPSILON, rngs=nnx.Rngs(0))
        x = jnp.tile(jnp.asarray([3.0, -3.0]), SIZE // 2)
        np.testing.assert_allclose(norm(x), x / 3, rtol=1e-3)
    assert np.all(np.asarray(norm.scale[...]) == stored)


@pytest.mark.parametrize("kind", ["layer_norm", "layer_norm_1p", "rms_norm", "rms_norm_1p"])
def test_is_float32_inside_bfloat16(rules_for, kind):
    x = jnp.asarray(make_input(), jnp.bfloat16)
    with use(rules_for(data=1)):
        norm = make_norm(kind)
        y = norm(x)
        exact = norm(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(y), np.asarray(exact.astype(jnp.bfloat16)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["layer_norm", "layer_norm_1p", "rms_norm", "rms_norm_1p"])
def test_gradients(rules_for, kind, bias):
    x = make_input()
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def formula(x, scale, beta):
        gamma = scale + 1 if kind.endswith("_1p") else scale
        centred = x if kind.startswith("rms_norm") else x - x.mean(-1, keepdims=True)
        return gamma * centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) + beta

    with use(rules_for(data=1)):
        norm = make_norm(kind, bias)
        graph, state = nnx.split(norm)
        _, pull = jax.vjp(lambda x, state: nnx.merge(graph, state)(x), jnp.asarray(x), state)
        dx, dstate = pull(jnp.asarray(cotangent))
        found = nnx.to_pure_dict(dstate)
    expected = jax.vjp(formula, *map(jnp.asarray, (x, np.asarray(norm.scale[...]), np.zeros(SIZE, np.float32))))[1](
        jnp.asarray(cotangent)
    )
    for row in range(3):
        # a row's gradient is as large as its inputs are small
        np.testing.assert_allclose(dx[row], expected[0][row], rtol=1e-3, atol=1e-5 * np.abs(expected[0][row]).max())
    np.testing.assert_allclose(found["scale"], expected[1], rtol=1e-4, atol=1e-4)
    if norm.bias is not None:
        np.testing.assert_allclose(found["bias"], expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("as_one", [True, False])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm_1p"])
def test_heads_have_scales_of_their_own(rules_for, kind, as_one):
    """Of each head by itself or of all as one, in values and gradients; copies of a head count as one."""
    generator = np.random.default_rng(0)
    x, cotangent = generator.normal(size=(2, 3, 5, 2, 8)).astype(np.float32)[:2]
    scales, biases = generator.normal(size=(2, 2, 8)).astype(np.float32)

    def formula(x, scale, bias):
        over = (-2, -1) if as_one else -1
        centred = x if kind == "rms_norm_1p" else x - x.mean(over, keepdims=True)
        gamma, beta = (scale + 1, 0) if kind == "rms_norm_1p" else (scale, bias)
        return gamma * centred / jnp.sqrt((centred**2).mean(over, keepdims=True) + EPSILON) + beta

    with use(rules_for(data=1)):
        norm = HeadNorm({"kv_heads": 2}, 8, as_one=as_one, kind=kind, bias=True, epsilon=EPSILON, rngs=nnx.Rngs(0))
        norm.scale[...] = scales
        if norm.bias is not None:
            norm.bias[...] = biases
        graph, state = nnx.split(norm)
        found, pull = jax.vjp(lambda x, state: nnx.merge(graph, state)(x), jnp.asarray(x), state)
        copied = norm(np.repeat(x, 3, 2))
        dx, dstate = pull(jnp.asarray(cotangent))
        pulled = (dx, *(nnx.to_pure_dict(dstate).get(name, np.zeros((2, 8))) for name in ("scale", "bias")))
    expected, pull = jax.vjp(formula, *map(jnp.asarray, (x, scales, biases)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(copied, np.repeat(expected, 3, 2), rtol=1e-4, atol=1e-5)
    for one, other in zip(pulled, pull(jnp.asarray(cotangent)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)

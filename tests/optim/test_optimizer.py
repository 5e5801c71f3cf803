"""Update rules against their formulas in numpy, alone and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.optim.config import OptimizerConfig
from jaxtron.optim.optimizer import clip_by_global_norm, decay_mask, descend, make_optimizer
from jaxtron.optim.schedule import learning_rate_schedule

ROLES = {
    "embed": {"table": "embedding", "positions": "position"},
    "layer": {"kernel": "kernel", "bias": "bias", "scale": "scale"},
}
SHAPES = {
    "embed": {"table": (16, 8), "positions": (4, 8)},
    "layer": {"kernel": (8, 16), "bias": (16,), "scale": (8,)},
}
SPECS = {
    "embed": {"table": P("tensor", None), "positions": P()},
    "layer": {"kernel": P("data", "tensor"), "bias": P("tensor"), "scale": P()},
}
STEPS = 3


def draw(seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: generator.normal(size=shape).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def run(config, parameters, gradients):
    optimizer, rate = make_optimizer(config, ROLES), learning_rate_schedule(config, STEPS)
    state = jax.jit(optimizer.init)(parameters)

    @jax.jit
    def step(parameters, state, gradients, number):
        clipped, norm = clip_by_global_norm(gradients, config.clip_norm)
        directions, state = optimizer.update(clipped, state, parameters)
        return descend(parameters, directions, rate(number)), state, norm

    for number, gradient in enumerate(gradients):
        parameters, state, norm = step(parameters, state, gradient, number)
    return parameters, state, norm


def to_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def run_both(config, expected_leaf):
    """Compare three updates with `expected_leaf(parameter, gradients, rates, decays)` for each leaf."""
    parameters, gradients = draw(0), [draw(seed) for seed in range(1, STEPS + 1)]
    rate = learning_rate_schedule(config, STEPS)
    rates = [float(rate(step)) for step in range(STEPS)]
    decays = decay_mask(config, ROLES)
    actual, _, _ = run(config, to_device(parameters), [to_device(gradient) for gradient in gradients])
    expected = jax.tree.map(
        lambda parameter, decays, *leaves: expected_leaf(
            parameter.astype(np.float64), [leaf.astype(np.float64) for leaf in leaves], rates, decays
        ),
        parameters,
        decays,
        *gradients,
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), actual, expected)


def test_adamw_follows_the_formula():
    config = OptimizerConfig(
        learning_rate=0.05, beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.3, warmup_steps=2, clip_norm=0
    )

    def formula(parameter, gradients, rates, decays):
        first, second = np.zeros_like(parameter), np.zeros_like(parameter)
        for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
            first = 0.8 * first + 0.2 * gradient
            second = 0.9 * second + 0.1 * gradient**2
            update = first / (1 - 0.8**number) / (np.sqrt(second / (1 - 0.9**number)) + 1e-6)
            parameter = parameter - rate * (update + (0.3 * parameter if decays else 0))
        return parameter

    run_both(config, formula)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_follows_the_formula(momentum, nesterov):
    config = OptimizerConfig(
        name="sgd", learning_rate=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.3, clip_norm=0
    )

    def formula(parameter, gradients, rates, decays):
        buffer = np.zeros_like(parameter)
        for gradient, rate in zip(gradients, rates, strict=True):
            gradient = gradient + (0.3 * parameter if decays else 0)
            buffer = momentum * buffer + gradient
            parameter = parameter - rate * (gradient + momentum * buffer if nesterov else buffer)
        return parameter

    run_both(config, formula)


def test_roles_choose_what_decays():
    everything_else = {"bias": False, "scale": False}
    assert decay_mask(OptimizerConfig(), ROLES) == {
        "embed": {"table": True, "positions": True},
        "layer": {"kernel": True, **everything_else},
    }
    assert decay_mask(OptimizerConfig(decay_roles=("bias",)), ROLES)["layer"] == {
        "kernel": False,
        "bias": True,
        "scale": False,
    }
    with pytest.raises(ValueError, match=r"unknown parameter roles \['gain'\]: use one of kernel"):
        decay_mask(OptimizerConfig(), {"norm": "gain"})


def test_clipping_scales_to_the_norm_and_reports_the_one_before():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[4.0]], jnp.bfloat16)}}
    clipped, norm = clip_by_global_norm(gradients, 1.0)
    assert norm == 5.0 and norm.dtype == jnp.float32
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-5)
    np.testing.assert_allclose(clipped["b"]["c"].astype(jnp.float32), [[0.8]], rtol=1e-2)
    assert clipped["b"]["c"].dtype == jnp.bfloat16
    for limit in (0.0, 5.1):
        untouched, norm = clip_by_global_norm(gradients, limit)
        assert norm == 5.0
        np.testing.assert_array_equal(untouched["a"], gradients["a"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_norm_tells_of_a_gradient_that_is_not_finite(bad):
    _, norm = clip_by_global_norm({"a": jnp.ones(3), "b": jnp.array([1.0, bad])}, 1.0)
    assert not jnp.isfinite(norm)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_moments_are_float32_for_bfloat16_parameters(name):
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw(0))
    updated, state, _ = run(OptimizerConfig(name=name), parameters, [parameters])
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype(jnp.bfloat16)}
    moments = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert moments and set(moments) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_sharded_equals_unsharded_and_moments_lie_as_their_parameters(name):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    config = OptimizerConfig(name=name, learning_rate=0.05, clip_norm=0.5)
    parameters, gradients = draw(0), [draw(seed) for seed in range(1, STEPS + 1)]
    expected, _, expected_norm = run(config, to_device(parameters), [to_device(gradient) for gradient in gradients])

    def place(tree):
        return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, SPECS)

    with jax.set_mesh(mesh):
        actual, state, norm = run(config, place(parameters), [place(gradient) for gradient in gradients])
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected)
    moments = {"adamw": lambda: (state[0].mu, state[0].nu), "sgd": lambda: (state[1].trace,)}[name]()
    for tree in (actual, *moments):
        jax.tree.map(lambda leaf, spec: _check_spec(leaf, spec), tree, SPECS)


def _check_spec(leaf, spec):
    assert leaf.sharding.is_equivalent_to(NamedSharding(leaf.sharding.mesh, spec), leaf.ndim), (leaf.sharding, spec)

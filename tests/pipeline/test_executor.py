"""The executor: what it sums, in which order and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.pipeline.executor import run
from jaxtron.pipeline.schedule import Entry, Schedule, one_stage


def make(num_microbatches, rows=3, width=5, dtype=np.float32):
    generator = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(generator.normal(size=(width, 2)), dtype), "bias": jnp.zeros(2)}
    batch = {
        "x": generator.normal(size=(num_microbatches, rows, width)).astype(np.float32),
        "y": generator.normal(size=(num_microbatches, rows, 2)).astype(np.float32),
    }
    return params, jax.tree.map(jnp.asarray, batch)


def stage_loss(params, microbatch):
    error = microbatch["x"] @ params["kernel"].astype(jnp.float32) + params["bias"] - microbatch["y"]
    return jnp.sum(error**2), {"absolute": jnp.sum(jnp.abs(error)), "rows": jnp.int32(len(error))}


@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
def test_gradients_and_reports_are_sums_over_microbatches(num_microbatches):
    params, batch = make(num_microbatches)
    gradients, reports = jax.jit(lambda *args: run(one_stage(num_microbatches), stage_loss, *args))(params, batch)
    whole = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), batch)
    expected, expected_reports = jax.grad(stage_loss, has_aux=True)(params, whole)
    for name in expected:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reports["absolute"], expected_reports["absolute"], rtol=1e-5)
    assert reports["rows"] == 3 * num_microbatches


@pytest.mark.parametrize("num_microbatches", [1, 512])
def test_gradients_are_summed_in_float32(num_microbatches):
    # in bfloat16 a sum of ones stops at 256
    params = {"weight": jnp.ones((), jnp.bfloat16)}

    def loss(params, microbatch):
        return jnp.sum(params["weight"] * microbatch), ()

    batch = jnp.ones((num_microbatches, 1), jnp.bfloat16)
    gradients, _ = jax.jit(lambda *args: run(one_stage(num_microbatches), loss, *args))(params, batch)
    assert gradients["weight"].dtype == jnp.float32
    assert gradients["weight"] == num_microbatches


def test_the_table_decides_what_runs():
    params, batch = make(3)
    table = Schedule(tuple((Entry("forward_backward", index),) for index in (2, 0)))
    gradients, reports = run(table, stage_loss, params, batch)
    chosen = jax.tree.map(lambda leaf: leaf[jnp.array([0, 2])].reshape(-1, leaf.shape[-1]), batch)
    expected, _ = jax.grad(stage_loss, has_aux=True)(params, chosen)
    np.testing.assert_allclose(gradients["kernel"], expected["kernel"], rtol=1e-5, atol=1e-5)
    assert reports["rows"] == 6


def test_one_microbatch_alone_makes_no_loop():
    params, batch = make(1)
    text = str(jax.make_jaxpr(lambda *args: run(one_stage(1), stage_loss, *args))(params, batch))
    assert "scan" not in text
    params, batch = make(2)
    assert "scan" in str(jax.make_jaxpr(lambda *args: run(one_stage(2), stage_loss, *args))(params, batch))


def test_more_stages_are_refused():
    params, batch = make(1)
    table = Schedule(((Entry("forward_backward", 0), Entry("idle")),))
    with pytest.raises(NotImplementedError, match="2 stages"):
        run(table, stage_loss, params, batch)


def test_an_idle_tick_runs_nothing():
    params, batch = make(2)
    table = Schedule(((Entry("forward_backward", 0),), (Entry("idle"),), (Entry("forward_backward", 1),)))
    gradients, reports = run(table, stage_loss, params, batch)
    assert reports["rows"] == 6
    expected, _ = run(one_stage(2), stage_loss, params, batch)
    np.testing.assert_allclose(gradients["kernel"], expected["kernel"], rtol=1e-6)

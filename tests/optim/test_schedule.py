"""Learning-rate schedules at named updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.optim.config import OptimizerConfig
from jaxtron.optim.schedule import learning_rate_schedule

PEAK, MINIMUM = 0.1, 0.001


def make_config(**settings):
    return OptimizerConfig(learning_rate=PEAK, warmup_steps=100, **settings)


# after the warm-up these are the values of Megatron-LM's own test of its scheduler
@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"schedule": "constant"}, {100: 0.1, 999: 0.1, 5000: 0.1}),
        (
            {"schedule": "linear", "minimum_learning_rate": MINIMUM},
            {100: 0.1, 500: 0.1 - 0.099 * 400 / 900, 1000: MINIMUM, 1001: MINIMUM, 5000: MINIMUM},
        ),
        (
            {"schedule": "cosine", "minimum_learning_rate": MINIMUM},
            {100: 0.1, 500: MINIMUM + 0.099 * 0.5 * (1 + math.cos(math.pi * 400 / 900)), 1000: MINIMUM, 5000: MINIMUM},
        ),
        ({"schedule": "inverse_square_root"}, {100: 0.1, 400: 0.05, 900: 0.1 / 3, 10000: 0.01}),
        ({"schedule": "inverse_square_root", "minimum_learning_rate": 0.04}, {100: 0.1, 400: 0.05, 900: 0.04}),
    ],
)
def test_course_after_warmup(settings, values):
    rate = learning_rate_schedule(make_config(**settings), total_steps=1000)
    for step, expected in values.items():
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize(
    ("style", "middle", "three_quarters"),
    [
        ("linear", 0.5, 0.25),
        ("cosine", 0.5, 0.5 * (1 + math.cos(0.75 * math.pi))),
        ("exponential", 2 * 0.5**0.5 - 1, 2 * 0.5**0.75 - 1),
        ("minus_square_root", 1 - 0.5**0.5, 1 - 0.75**0.5),
    ],
)
def test_warmup_stable_decay(style, middle, three_quarters):
    config = make_config(
        schedule="warmup_stable_decay", minimum_learning_rate=MINIMUM, anneal_steps=200, anneal_style=style
    )
    rate = learning_rate_schedule(config, total_steps=1000)
    coefficients = {100: 1, 500: 1, 800: 1, 900: middle, 950: three_quarters, 1000: 0, 1500: 0}
    for step, coefficient in coefficients.items():
        expected = MINIMUM + coefficient * (PEAK - MINIMUM)
        np.testing.assert_allclose(rate(step), expected, rtol=1e-4, atol=1e-7, err_msg=f"step {step}")


def test_stable_decay_anneals_over_the_last_tenth_unless_told():
    rate = learning_rate_schedule(make_config(schedule="warmup_stable_decay"), total_steps=1000)
    np.testing.assert_allclose([rate(900), rate(950), rate(1000)], [0.1, 0.05, 0.0], atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_square_root", "warmup_stable_decay"])
def test_warmup_is_linear_and_never_zero(schedule):
    rate = learning_rate_schedule(make_config(schedule=schedule), total_steps=1000)
    np.testing.assert_allclose(
        [rate(0), rate(49), rate(99)], [PEAK / 101, PEAK * 50 / 101, PEAK * 100 / 101], rtol=1e-5
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "inverse_square_root", "warmup_stable_decay"])
def test_without_warmup_the_first_update_has_the_peak(schedule):
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=PEAK, schedule=schedule), total_steps=50)
    np.testing.assert_allclose(rate(0), PEAK, rtol=1e-6)


def test_decay_steps_override_the_length_of_the_run():
    rate = learning_rate_schedule(make_config(schedule="linear", decay_steps=300), total_steps=1000)
    np.testing.assert_allclose([rate(200), rate(300), rate(999)], [0.05, 0.0, 0.0], atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "warmup_stable_decay"])
def test_short_run_stays_in_its_warmup(schedule):
    rate = learning_rate_schedule(make_config(schedule=schedule), total_steps=5)
    np.testing.assert_allclose(rate(4), PEAK * 5 / 101, rtol=1e-5)


def test_traced_equals_eager():
    rate = learning_rate_schedule(make_config(schedule="cosine"), total_steps=1000)
    steps = jnp.arange(0, 1100, 13)
    traced = jax.jit(jax.vmap(rate))(steps)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, [rate(int(step)) for step in steps], rtol=1e-5, atol=1e-8)


def test_stable_decay_that_does_not_fit_is_refused():
    config = make_config(schedule="warmup_stable_decay", anneal_steps=950)
    with pytest.raises(
        UserError,
        match="optimizer.warmup_steps 100 and optimizer.anneal_steps 950 do not fit into optimizer.decay_steps 1000",
    ):
        learning_rate_schedule(config, total_steps=1000)

"""The dynamic loss scale against a plain state machine."""

import random

import jax
import jax.numpy as jnp
import pytest
from pydantic import ValidationError

from jaxtron.optim.config import LARGEST_LOSS_SCALE, LossScaleConfig
from jaxtron.optim.loss_scale import LossScale, initial_loss_scale, overflows_in_a_row, update_loss_scale


def reference(config, outcomes):
    """Yield (scale, steps in a row, overflows left) after each outcome; overflows in a row count down from 0."""
    scale, row, overflows_left = config.initial, 0, config.hysteresis
    for finite in outcomes:
        before = scale
        row = (row if (row > 0) == finite else 0) + (1 if finite else -1)
        if finite:
            if row == config.window:
                scale, row, overflows_left = scale * config.growth, 0, config.hysteresis
        else:
            overflows_left = max(overflows_left - 1, 0)
            if overflows_left == 0:
                scale = max(scale * config.backoff, config.minimum)
        row = 0 if scale != before else row
        yield scale, row, overflows_left


@pytest.mark.parametrize(
    ("settings", "finite_share"),
    [
        ({"window": 3, "hysteresis": 2}, 0.7),
        ({"window": 5, "hysteresis": 1, "growth": 4.0, "backoff": 0.25}, 0.8),
        ({"initial": 8.0, "window": 2, "hysteresis": 3}, 0.3),
        ({"initial": 8.0, "minimum": 4.0, "window": 3}, 0.2),
    ],
)
def test_follows_the_state_machine(settings, finite_share):
    config = LossScaleConfig(**settings)
    outcomes = [random.Random(seed).random() < finite_share for seed in range(200)]
    step = jax.jit(lambda state, finite: update_loss_scale(state, finite, config))
    state = initial_loss_scale(config)
    for finite, expected in zip(outcomes, reference(config, outcomes), strict=True):
        state = step(state, jnp.bool_(finite))
        assert (float(state.scale), int(state.finite_steps), int(state.overflows_left)) == expected


def test_hysteresis_is_renewed_by_growth_alone():
    config = LossScaleConfig(initial=16.0, window=4, hysteresis=2)
    scales = []
    state = initial_loss_scale(config)
    for finite in (False, True, False, False, True, True, True, True, False, False):
        state = update_loss_scale(state, jnp.bool_(finite), config)
        scales.append(float(state.scale))
    assert scales == [16, 16, 8, 4, 4, 4, 4, 8, 8, 4]


def test_never_falls_below_the_minimum():
    config = LossScaleConfig(initial=4.0, minimum=2.0, hysteresis=1)
    state = initial_loss_scale(config)
    for _ in range(5):
        state = update_loss_scale(state, jnp.bool_(False), config)
    assert float(state.scale) == 2.0
    # the first one was at another scale
    assert overflows_in_a_row(state) == 4
    assert overflows_in_a_row(update_loss_scale(state, jnp.bool_(True), config)) == 0


def test_does_not_grow_for_ever():
    config = LossScaleConfig(initial=LARGEST_LOSS_SCALE / 2, window=1, growth=1e30)
    state = initial_loss_scale(config)
    for _ in range(4):
        state = update_loss_scale(state, jnp.bool_(True), config)
    assert float(state.scale) == LARGEST_LOSS_SCALE
    for _ in range(config.hysteresis):
        state = update_loss_scale(state, jnp.bool_(False), config)
    assert float(state.scale) == LARGEST_LOSS_SCALE / 2


def test_state_is_a_pytree_of_arrays():
    state = initial_loss_scale(LossScaleConfig())
    leaves, structure = jax.tree.flatten(state)
    assert [leaf.dtype for leaf in leaves] == [jnp.float32, jnp.int32, jnp.int32]
    assert isinstance(jax.tree.unflatten(structure, leaves), LossScale)


@pytest.mark.parametrize(
    "settings",
    [
        {"growth": 1.0},
        {"backoff": 1.0},
        {"window": 0},
        {"hysteresis": 0},
        {"initial": 1.0, "minimum": 2.0},
        {"initial": 1e39},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        LossScaleConfig(**settings)

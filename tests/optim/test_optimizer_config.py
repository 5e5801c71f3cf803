"""A setting of the optimizer that would not take effect is refused."""

import pytest
from pydantic import ValidationError

from jaxtron.config import settings
from jaxtron.optim.config import OptimizerConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "sgd", "beta1": 0.8},
            "optimizer.beta1 0.8 has no effect with optimizer.name sgd: leave it out, or choose optimizer.name adamw",
        ),
        ({"name": "sgd", "beta2": 0.99}, "optimizer.beta2 0.99 has no effect with optimizer.name sgd"),
        ({"name": "sgd", "epsilon": 1e-6}, "optimizer.epsilon 1e-06 has no effect with optimizer.name sgd"),
        (
            {"momentum": 0.5},
            "optimizer.momentum 0.5 has no effect with optimizer.name adamw: leave it out, or choose",
        ),
        ({"nesterov": True}, "optimizer.nesterov true has no effect with optimizer.name adamw"),
        (
            {"name": "sgd", "nesterov": True, "momentum": 0},
            "optimizer.nesterov true has no effect with optimizer.momentum 0",
        ),
        (
            {"schedule": "constant", "decay_steps": 5},
            "choose optimizer.schedule linear or cosine or warmup_stable_decay",
        ),
        (
            {"schedule": "constant", "minimum_learning_rate": 1e-5},
            "optimizer.minimum_learning_rate 1e-05 has no effect",
        ),
        ({"schedule": "inverse_square_root", "decay_steps": 5}, "optimizer.decay_steps 5 has no effect"),
        (
            {"schedule": "cosine", "anneal_steps": 5},
            "optimizer.anneal_steps 5 has no effect with optimizer.schedule cosine",
        ),
        ({"schedule": "linear", "anneal_style": "cosine"}, "optimizer.anneal_style cosine has no effect"),
        (
            {"weight_decay": 0, "decay_roles": ["kernel"]},
            "optimizer.decay_roles [kernel] has no effect with optimizer.weight_decay 0.0",
        ),
        ({"minimum_learning_rate": 1.0}, "optimizer.minimum_learning_rate 1.0 is above optimizer.learning_rate 0.0003"),
        ({"decay_steps": 10, "warmup_steps": 10}, "optimizer.decay_steps 10 must be above optimizer.warmup_steps 10"),
    ],
)
def test_setting_without_effect_is_refused_in_one_line(settings, message):
    with pytest.raises(ValidationError) as caught:
        OptimizerConfig(**settings)
    (error,) = caught.value.errors()
    assert message in error["msg"]
    assert "\n" not in error["msg"]


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0},
        {"learning_rate": -1e-3},
        {"warmup_steps": -1},
        {"beta1": 1.0},
        {"clip_norm": -1},
        {"weight_decay": -0.1},
        {"name": "lion"},
        {"schedule": "wsd"},
        {"decay_roles": ["kernels"]},
        {"lr": 1e-3},
    ],
)
def test_values_out_of_range_and_unknown_names_are_refused(settings):
    with pytest.raises(ValidationError):
        OptimizerConfig(**settings)


def test_saved_configuration_loads_again():
    config = OptimizerConfig(name="sgd", schedule="constant", momentum=0.5, clip_norm=0)
    assert OptimizerConfig(**config.model_dump()) == config
    assert OptimizerConfig.model_validate_json(config.model_dump_json()) == config


def test_every_field_has_a_meaning():
    assert all(setting.meaning for setting in settings(OptimizerConfig).values())

"""The settings of a run that are refused."""

import pytest
from pydantic import ValidationError

from jaxtron.config import settings
from jaxtron.run.run_config import RunConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"wandb_project": "mine"},
            "run.wandb_project mine has no effect with run.trackers .*: leave it out, or add wandb",
        ),
        ({"trackers": ["wandb", "wandb"]}, "run.trackers wandb wandb names one twice"),
        ({"profile_steps": [5, 4]}, "run.profile_steps 5 4 is no range of steps"),
        ({"profile_steps": [1, 4]}, "from 2 on"),
        ({"trackers": ["mlflow"]}, "tensorboard"),
        ({"log_every": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig(**settings)


def test_settings_load_again():
    config = RunConfig(trackers=("wandb",), wandb_project="mine", profile_steps=(2, 4))
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert all(setting.meaning for setting in settings(RunConfig).values())

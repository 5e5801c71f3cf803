"""The settings of a run's directory and of what it records there."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, FileName, NoEffect, UserError

TrackerName = Literal["tensorboard", "wandb"]

# a thousand years or so
MOST_MINUTES = 5e8


class RunConfig(Config):
    """Where a run lies, and what it records and prints."""

    directory: FileName | None = None
    """directory of the run; none: runs/<name of the configuration>"""
    log_every: int = Field(default=10, ge=1)
    """steps between logged steps; the last one is always logged"""
    print_seconds: float = Field(default=10.0, gt=0)
    """least seconds between progress lines where the output is no terminal"""
    trackers: tuple[TrackerName, ...] = ()
    """also log to these: tensorboard, wandb"""
    wandb_project: str = "jaxtron"
    """project at Weights & Biases"""
    max_minutes: float | None = Field(default=None, gt=0, le=MOST_MINUTES)
    """the run saves and stops after the first step that ends later than so many minutes after the command began, with
    exit code 130, and the same command continues (none: it goes on to train.steps)"""
    profile_steps: tuple[int, int] | None = None
    """first and last step of a jax.profiler trace in <run>/profile; none: no trace"""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if "wandb" not in self.trackers and self.wandb_project != type(self).model_fields["wandb_project"].default:
            raise NoEffect(
                "run.wandb_project",
                self.wandb_project,
                {"run.trackers": self.trackers},
                "leave it out, or add wandb to run.trackers",
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise UserError(f"run.trackers {' '.join(self.trackers)} names one twice: name each once")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 2 <= first <= last:
                raise UserError(
                    f"run.profile_steps {first} {last} is no range of steps: give first and last, from 2 on"
                )
        return self

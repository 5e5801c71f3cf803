"""The settings of a run's directory and of what it records there."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, FileName, NoEffect, UserError

TrackerName = Literal["tensorboard", "wandb"]

# a thousand years or so
MOST_MINUTES = 5e8


class WatchdogConfig(Config):
    """When a step that does not come ends the run, with the stacks of every process and exit code 75, "try again"."""

    factor: float | None = Field(default=20.0, ge=2)
    """a step may take so many times the median of the last hundred; none: as long as it likes"""
    floor_seconds: float = Field(default=600.0, gt=0)
    """and in any case so many seconds, the first steps of a command six times as many"""

    @model_validator(mode="after")
    def _check(self) -> "WatchdogConfig":
        if self.factor is None and self.floor_seconds != type(self).model_fields["floor_seconds"].default:
            raise NoEffect("train.watchdog.floor_seconds", self.floor_seconds, {"train.watchdog.factor": None})
        return self


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

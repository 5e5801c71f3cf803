"""The optimizer's configuration: the rule, the learning-rate schedule, weight decay and clipping."""

from typing import Literal, NoReturn

from pydantic import Field, model_validator

from jaxtron.config import Config, NoEffect, UserError
from jaxtron.roles import Role

Schedule = Literal["constant", "linear", "cosine", "inverse_square_root", "warmup_stable_decay"]
AnnealStyle = Literal["linear", "cosine", "exponential", "minus_square_root"]

NAME_FIELDS = {
    "adamw": ("beta1", "beta2", "epsilon"),
    "sgd": ("momentum", "nesterov"),
}
SCHEDULE_FIELDS = {
    "constant": (),
    "linear": ("minimum_learning_rate", "decay_steps"),
    "cosine": ("minimum_learning_rate", "decay_steps"),
    "inverse_square_root": ("minimum_learning_rate",),
    "warmup_stable_decay": ("minimum_learning_rate", "decay_steps", "anneal_steps", "anneal_style"),
}


class OptimizerConfig(Config):
    """How gradients become updates; a field that the chosen rule or schedule ignores must keep its default."""

    name: Literal["adamw", "sgd"] = "adamw"
    """update rule"""
    learning_rate: float = Field(default=3e-4, gt=0)
    """peak learning rate, reached after warm-up"""
    schedule: Schedule = "cosine"
    """course of the learning rate after warm-up"""
    warmup_steps: int = Field(default=0, ge=0)
    """updates of linear warm-up before the schedule begins"""
    decay_steps: int | None = Field(default=None, gt=0)
    """update at which the minimum is reached, warm-up included; None: train.steps"""
    minimum_learning_rate: float = Field(default=0.0, ge=0)
    """learning rate at the end of the decay"""
    anneal_steps: int | None = Field(default=None, gt=0)
    """warmup_stable_decay: length of the final decay; None: a tenth of decay_steps"""
    anneal_style: AnnealStyle = "linear"
    """warmup_stable_decay: course of the final decay"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """adamw: decay of the first moment"""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """adamw: decay of the second moment"""
    epsilon: float = Field(default=1e-8, gt=0)
    """adamw: added to the root of the second moment"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd: momentum; 0 turns it off"""
    nesterov: bool = False
    """sgd: Nesterov's momentum"""
    weight_decay: float = Field(default=0.1, ge=0)
    """weight decay of the parameters named by decay_roles"""
    decay_roles: tuple[Role, ...] = ("kernel", "embedding", "position", "router", "adapter")
    """roles of the parameters that decay"""
    clip_norm: float = Field(default=1.0, ge=0)
    """largest global norm of the gradients; 0 turns clipping off"""

    @model_validator(mode="after")
    def _refuse_ignored_fields(self) -> "OptimizerConfig":
        for choice, fields in (("name", NAME_FIELDS), ("schedule", SCHEDULE_FIELDS)):
            used = fields[getattr(self, choice)]
            for field in dict.fromkeys(field for names in fields.values() for field in names):
                users = " or ".join(value for value, names in fields.items() if field in names)
                if field not in used and self._is_changed(field):
                    self._refuse(field, choice, f"leave it out, or choose optimizer.{choice} {users}")
        if self.weight_decay == 0 and self._is_changed("decay_roles"):
            self._refuse("decay_roles", "weight_decay", "leave it out")
        if self.nesterov and self.momentum == 0:
            self._refuse("nesterov", "momentum", "leave it out, or set a momentum such as 0.9")
        return self

    def _refuse(self, field: str, choice: str, mend: str) -> NoReturn:
        because = {f"optimizer.{choice}": getattr(self, choice)}
        raise NoEffect(f"optimizer.{field}", getattr(self, field), because, mend)

    @model_validator(mode="after")
    def _check_sizes(self) -> "OptimizerConfig":
        if self.minimum_learning_rate > self.learning_rate:
            raise UserError(
                f"optimizer.minimum_learning_rate {self.minimum_learning_rate} is above optimizer.learning_rate "
                f"{self.learning_rate}: lower it"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps {self.decay_steps} must be above optimizer.warmup_steps {self.warmup_steps}, "
                "which it includes: raise it or warm up for less"
            )
        return self

    def _is_changed(self, field: str) -> bool:
        # by value and not by `model_fields_set`, so that a saved configuration, which names every field, loads again
        return getattr(self, field) != type(self).model_fields[field].default


# float16's smallest number times this is far from its largest, and float32 has room for any loss times this
LARGEST_LOSS_SCALE = 2.0**64


class LossScaleConfig(Config):
    """When the loss scale grows and when it backs off."""

    initial: float = Field(default=2.0**16, gt=0, le=LARGEST_LOSS_SCALE)
    """first scale; Megatron's 2**32 skips its first dozen steps"""
    minimum: float = Field(default=1.0, gt=0)
    """smallest scale"""
    growth: float = Field(default=2.0, gt=1)
    """factor of growth after a window without overflow"""
    backoff: float = Field(default=0.5, gt=0, lt=1)
    """factor on overflow, once hysteresis is used up"""
    window: int = Field(default=1000, gt=0)
    """consecutive finite steps before the scale grows"""
    hysteresis: int = Field(default=2, gt=0)
    """overflows before the scale backs off, renewed when it grows"""

    @model_validator(mode="after")
    def _check_minimum(self) -> "LossScaleConfig":
        if self.minimum > self.initial:
            raise UserError(
                f"train.loss_scale.minimum {self.minimum} is above train.loss_scale.initial {self.initial}: lower it"
            )
        return self


class HealthConfig(Config):
    """Steps that are bad, which are not applied: a loss or gradient that is not finite, or far above the last ones."""

    on_bad: Literal["stop", "skip", "rewind"] = "stop"
    """stop: the run ends with an error; skip: it goes on with the next batch; rewind: it goes back to the newest
    checkpoint and leaves out the batches from there to the bad one"""
    gradient_spike: float | None = Field(default=None, gt=1)
    """a gradient norm above so many times the median of the last good steps is bad (none: any finite one is good)"""
    loss_spike: float | None = Field(default=None, gt=1)
    """a loss above so many times the median of the last good steps is bad (none: any finite one is good)"""
    window: int = Field(default=100, ge=1, le=10_000)
    """good steps that the medians are of; nothing is a spike before there were so many"""
    patience: int = Field(default=10, ge=1)
    """skip: bad steps in a row, rewind: returns to the same checkpoint, after which the run ends all the same"""
    replay_every: int | None = Field(default=None, ge=1)
    """every so many steps the step is computed twice more from the same state: bits that differ are a device that
    computes wrong, which is named; that costs two steps of so many (none: never)"""
    compare_every: int | None = Field(default=None, ge=1)
    """every so many steps, and before a checkpoint, parts of the state that several devices have are compared bit by
    bit, and the device that differs from the others is named (none: never)"""

    @property
    def is_on(self) -> bool:
        """Whether steps are guarded; otherwise a step that is not finite is noticed after it was applied."""
        return self.on_bad != "stop" or self.gradient_spike is not None or self.loss_spike is not None

    @model_validator(mode="after")
    def _check(self) -> "HealthConfig":
        fields = type(self).model_fields
        if self.window != fields["window"].default and self.gradient_spike is None and self.loss_spike is None:
            raise NoEffect(
                "train.health.window",
                self.window,
                {"train.health.gradient_spike": None, "train.health.loss_spike": None},
                "leave it out, or give one of them",
            )
        if self.patience != fields["patience"].default and self.on_bad == "stop":
            raise NoEffect(
                "train.health.patience",
                self.patience,
                {"train.health.on_bad": self.on_bad},
                "leave it out, or choose skip or rewind",
            )
        return self


class BatchRampConfig(Config):
    """From `start` to the global batch, `increment` at a time, over `samples`."""

    start: int = Field(gt=0)
    """global batch of the first step"""
    increment: int = Field(gt=0)
    """what each stage adds to the global batch"""
    samples: int = Field(gt=0)
    """samples after which the global batch is whole"""

"""A training that diverges: noticed before anything of it is saved, and told in one line with the way back."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxtron.checkpoint.finite import first_not_finite
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import step_path
from jaxtron.config import UserError
from jaxtron.optim.config import HealthConfig, LossScaleConfig
from jaxtron.optim.guard import Health
from jaxtron.optim.loss_scale import overflows_in_a_row
from jaxtron.train.hooks import StepInfo
from jaxtron.typing import Array, PyTree

# of an event: its name, the step, a line for the user, what it concerns
Tell = Callable[[str, int, str, dict[str, Any]], None]
ADVICE = "lower --optimizer.learning_rate or raise --optimizer.warmup_steps"

# beyond those of hysteresis: the scale is as small as it may be, or will not get there
MOST_OVERFLOWS = 20


class Diverged(UserError):
    """The error of a training that diverged after a step: the next one, or the state that it left."""

    def __init__(self, message: str, after: int) -> None:
        super().__init__(message)
        self.after = after


def diverged(checkpoints: Checkpoints, after: int, what: str, advice: str = ADVICE) -> Diverged:
    """The error for a state that step `after` left: what is wrong with it, and which checkpoint to go back to."""
    checkpoints.wait()
    *_, newest = (None, *(step for step in checkpoints.steps() if step < after))
    if after not in checkpoints.steps():
        since = "no checkpoint was saved" if newest is None else f"the checkpoint of step {newest} is kept"
        return Diverged(f"{what}; {advice} ({since})", after)
    way = "there is no earlier one, choose another --run.directory"
    if newest is not None:
        way = f"delete {step_path(checkpoints.directory, after)} to go back to that of step {newest}"
    return Diverged(f"{what}: the checkpoint of step {after} has diverged; {way}, and {advice}", after)


def _figures(step: int, loss: float, norm: float) -> str:
    return f"step {step}: loss {loss}, gradient norm {norm}"


def check_state(checkpoints: Checkpoints, step: int, state: PyTree) -> None:
    """`UserError` if any number of the state that a step left is NaN or infinite."""
    name = first_not_finite(state)
    if name is not None:
        raise diverged(checkpoints, step, f"{name} has numbers that are not finite after step {step}")


class Corrupted(UserError):
    """The error of a training on a device that computed something else than the others, or than the first time."""


def corrupted(checkpoints: Checkpoints, after: int, what: str) -> Corrupted:
    """The error for what a device did wrong; the state of step `after` is the last that is not known to be wrong."""
    checkpoints.wait()
    newest = max((step for step in checkpoints.steps() if step <= after), default=None)
    since = "no checkpoint was saved" if newest is None else f"the checkpoint of step {newest} is kept"
    return Corrupted(f"{what}; have that host looked at, and give the same command again without it ({since})")


class Rewind(Exception):
    """The run is to go back to its newest checkpoint, and on from there with the data from `position` on.

    That is after a bad step's; None: as the checkpoint has it, for the data were not at fault.
    """

    def __init__(self, step: int, position: int | None, why: str) -> None:
        super().__init__(f"back from step {step}")
        self.step, self.position, self.why = step, position, why


class Watch:
    """Looks at the loss and the gradient norm of every step, every few steps, for looking waits for the device.

    A hook of every step, on every process. With a loss scale (fp16) an overflow of the gradients is its to handle,
    unless there is no end to them. With a guard (`train.health`) bad steps were not applied: what becomes of the run is
    decided here, and `tell` gets a line and an event of each.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        every: int,
        loss_scale: LossScaleConfig | None,
        health: HealthConfig | None = None,
        state: Health | None = None,
        tell: Tell = lambda *_: None,
    ) -> None:
        self._checkpoints = checkpoints
        self._every = every
        self._loss_scale = loss_scale
        self._health = health if health is not None and health.is_on else None
        self._bad, self._row = (0, 0) if state is None else (int(state.bad), int(state.row))
        self._tell = tell
        self._unseen: list[tuple[StepInfo, dict[str, Array]]] = []

    def __call__(self, info: StepInfo) -> None:
        """Remember the step, and look where it is time to."""
        seen = {name: info.metrics[name] for name in ("loss", "gradient_norm", "bad_steps") if name in info.metrics}
        self._unseen.append((replace(info, state=None, metrics={}), seen))
        if info.step % self._every == 0 or info.step == info.total_steps:
            self.check()
            if self._loss_scale is not None:
                self._check_overflows(info, self._loss_scale)

    def check(self) -> None:
        """`UserError` if a step since the last look had a loss or a gradient that is not finite, or was bad.

        `Rewind` where the run goes back for that.
        """
        unseen, self._unseen = jax.device_get(self._unseen), []
        position = None
        for info, seen in unseen:
            loss, norm = float(seen["loss"]), float(seen["gradient_norm"])
            if self._health is not None:
                is_bad = seen["bad_steps"] > self._bad
                self._bad, self._row = int(seen["bad_steps"]), self._row + 1 if is_bad else 0
                if is_bad:
                    self._judge(self._health, info, loss, norm)
                    position = info.samples[1]
            elif not math.isfinite(loss) or not (math.isfinite(norm) or self._loss_scale is not None):
                # both are of the state before the step's update
                raise diverged(self._checkpoints, info.step - 1, _figures(info.step, loss, norm))
        if position is not None and self._health is not None and self._health.on_bad == "rewind":
            step = unseen[-1][0].step
            raise Rewind(step, position, f"step {step} was not applied")

    def _judge(self, health: HealthConfig, info: StepInfo, loss: float, norm: float) -> None:
        what = f"{_figures(info.step, loss, norm)}: not applied"
        self._tell("bad_step", info.step, what, {"loss": loss, "gradient_norm": norm, "samples": list(info.samples)})
        if health.on_bad == "stop":
            advice = f"{ADVICE}, or set --train.health.on_bad skip or rewind"
            raise diverged(self._checkpoints, info.step - 1, what, advice)
        if health.on_bad == "skip" and self._row >= health.patience:
            what = f"{what}, nor were the {self._row - 1} before it" if self._row > 1 else what
            raise diverged(self._checkpoints, info.step - 1, f"{what} (train.health.patience {health.patience})")

    def _check_overflows(self, info: StepInfo, config: LossScaleConfig) -> None:
        scale = info.state.loss_scale
        in_a_row = overflows_in_a_row(scale)
        if in_a_row >= config.hysteresis + MOST_OVERFLOWS:
            what = f"the {in_a_row} steps up to step {info.step} were"
        elif info.step == info.total_steps == int(info.metrics["skipped_steps"]):
            what = f"all steps up to step {info.step} were"
        else:
            return
        what = f"{what} skipped: their gradients overflow float16 at a loss scale of {float(scale.scale):g}"
        advice = f"lower --train.loss_scale.minimum below {config.minimum:g}" if float(scale.scale) > 1 else ADVICE
        raise diverged(self._checkpoints, info.step, what, f"{advice}, or set --train.precision bf16")

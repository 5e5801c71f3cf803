"""A training that diverges: noticed before anything of it is saved, and told in one line with the way back."""

import math

import jax

from jaxtron.checkpoint.finite import first_not_finite
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import step_path
from jaxtron.config import UserError
from jaxtron.optim.config import LossScaleConfig
from jaxtron.optim.loss_scale import overflows_in_a_row
from jaxtron.train.hooks import StepInfo
from jaxtron.typing import Array, PyTree

ADVICE = "lower --optimizer.learning_rate or raise --optimizer.warmup_steps"

# beyond those of hysteresis: the scale is as small as it may be, or will not get there
MOST_OVERFLOWS = 20


def diverged(checkpoints: Checkpoints, after: int, what: str, advice: str = ADVICE) -> UserError:
    """The error for a state that step `after` left: what is wrong with it, and which checkpoint to go back to."""
    checkpoints.wait()
    *_, newest = (None, *(step for step in checkpoints.steps() if step < after))
    if after not in checkpoints.steps():
        since = "no checkpoint was saved" if newest is None else f"the checkpoint of step {newest} is kept"
        return UserError(f"{what}; {advice} ({since})")
    way = "there is no earlier one, choose another --run.directory"
    if newest is not None:
        way = f"delete {step_path(checkpoints.directory, after)} to go back to that of step {newest}"
    return UserError(f"{what}: the checkpoint of step {after} has diverged; {way}, and {advice}")


def check_state(checkpoints: Checkpoints, step: int, state: PyTree) -> None:
    """`UserError` if any number of the state that a step left is NaN or infinite."""
    name = first_not_finite(state)
    if name is not None:
        raise diverged(checkpoints, step, f"{name} has numbers that are not finite after step {step}")


class Watch:
    """Looks at the loss and the gradient norm of every step, every few steps, for looking waits for the device.

    A hook of every step, on every process. With a loss scale (fp16) an overflow of the gradients is its to handle,
    unless there is no end to them.
    """

    def __init__(self, checkpoints: Checkpoints, *, every: int, loss_scale: LossScaleConfig | None) -> None:
        self._checkpoints = checkpoints
        self._every = every
        self._loss_scale = loss_scale
        self._unseen: list[tuple[int, Array, Array]] = []

    def __call__(self, info: StepInfo) -> None:
        """Remember the step, and look where it is time to."""
        self._unseen.append((info.step, info.metrics["loss"], info.metrics["gradient_norm"]))
        if info.step % self._every == 0 or info.step == info.total_steps:
            self.check()
            if self._loss_scale is not None:
                self._check_overflows(info, self._loss_scale)

    def check(self) -> None:
        """`UserError` if a step since the last look had a loss or a gradient that is not finite."""
        unseen, self._unseen = jax.device_get(self._unseen), []
        for step, loss, norm in unseen:
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._loss_scale is not None):
                # both are of the state before the step's update
                raise diverged(self._checkpoints, step - 1, f"step {step}: loss {loss}, gradient norm {norm}")

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

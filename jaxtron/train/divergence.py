"""A training that diverges: noticed before anything of it is saved, and told in one line with the way back."""

import math

import jax

from jaxtron.checkpoint.finite import first_not_finite
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import step_path
from jaxtron.config import UserError
from jaxtron.train.hooks import StepInfo
from jaxtron.typing import Array, PyTree

ADVICE = "lower --optimizer.learning_rate or raise --optimizer.warmup_steps"


def diverged(checkpoints: Checkpoints, after: int, what: str) -> UserError:
    """The error for a state that step `after` left: what is wrong with it, and which checkpoint to go back to."""
    checkpoints.wait()
    *_, newest = (None, *(step for step in checkpoints.steps() if step < after))
    if after not in checkpoints.steps():
        since = "no checkpoint was saved" if newest is None else f"the checkpoint of step {newest} is kept"
        return UserError(f"{what}; {ADVICE} ({since})")
    way = "there is no earlier one, choose another --run.directory"
    if newest is not None:
        way = f"delete {step_path(checkpoints.directory, after)} to go back to that of step {newest}"
    return UserError(f"{what}: the checkpoint of step {after} has diverged; {way}, and {ADVICE}")


def check_state(checkpoints: Checkpoints, step: int, state: PyTree) -> None:
    """`UserError` if any number of the state that a step left is NaN or infinite."""
    name = first_not_finite(state)
    if name is not None:
        raise diverged(checkpoints, step, f"{name} has numbers that are not finite after step {step}")


class Watch:
    """Looks at the loss and the gradient norm of every step, every few steps, for looking waits for the device.

    A hook of every step, on every process. With fp16 an overflow of the gradients is the loss scale's to handle.
    """

    def __init__(self, checkpoints: Checkpoints, *, every: int, has_loss_scale: bool) -> None:
        self._checkpoints = checkpoints
        self._every = every
        self._has_loss_scale = has_loss_scale
        self._unseen: list[tuple[int, Array, Array]] = []

    def __call__(self, info: StepInfo) -> None:
        """Remember the step, and look where it is time to."""
        self._unseen.append((info.step, info.metrics["loss"], info.metrics["gradient_norm"]))
        if info.step % self._every == 0 or info.step == info.total_steps:
            self.check()

    def check(self) -> None:
        """`UserError` if a step since the last look had a loss or a gradient that is not finite."""
        unseen, self._unseen = jax.device_get(self._unseen), []
        for step, loss, norm in unseen:
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._has_loss_scale):
                # both are of the state before the step's update
                raise diverged(self._checkpoints, step - 1, f"step {step}: loss {loss}, gradient norm {norm}")

"""A step computed twice from the same state: where bits differ a device computes wrong (`health.replay_every`)."""

from typing import Any

import jax
import numpy as np
from jaxtyping import UInt32

from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.config import UserError
from jaxtron.optim.config import HealthConfig
from jaxtron.run.session import RunSession
from jaxtron.run.state import TrainState
from jaxtron.train.divergence import Rewind, Tell, corrupted
from jaxtron.train.integrity.places import Places

# the columns of `Trainer.checksums`: a fault shows in the first of them on the device that has it, later on all
STAGES = ("its part of the loss", "its part of the gradients", "the new state")


class Replay:
    """Looks at every so many steps before they are taken; every process calls it, and comes to the same.

    What is compared are checksums that the devices make where they are, of a program that keeps nothing else. With
    on_bad skip a difference is told and the step taken all the same; with rewind the run goes back.
    """

    def __init__(
        self, session: RunSession, checkpoints: Checkpoints, places: Places, health: HealthConfig, tell: Tell
    ) -> None:
        assert health.replay_every is not None
        self._session, self._checkpoints, self._places = session, checkpoints, places
        self._health, self._every, self._tell = health, health.replay_every, tell
        self._row = 0

    def is_due(self, step: int) -> bool:
        """Whether the step to come is one of those that are looked at."""
        return step % self._every == 0

    def __call__(self, step: int, state: TrainState, batch: Any) -> None:
        """Compute the step to come twice; `UserError` or `Rewind` where that differs."""
        first, second = (jax.device_get(self._session.checksums(state, batch)) for _ in range(2))
        found = differing(first, second)
        if found is None:
            self._row = 0
            return
        stage, rows = found
        self._row += 1
        where = self._places.names(rows)
        what = f"step {step} was computed twice from the same state, and {STAGES[stage]} differs on {where}"
        about = {"what": STAGES[stage], **self._places.about(rows)}
        self._tell("replay_differs", step, what, about)
        if self._health.on_bad == "rewind":
            raise Rewind(step, None, what)
        if self._health.on_bad == "stop" or self._row >= self._health.patience:
            again = f", for the time no. {self._row} in a row" if self._row > 1 else ""
            raise corrupted(self._checkpoints, step - 1, what + again)


def check_replay(platform: str, every: int) -> None:
    """`UserError` on devices of a platform whose operations add up in any order, where nothing was set against it."""
    if platform != "cpu":
        raise UserError(
            f"train.health.replay_every {every}: on GPUs a step has other bits each time, unless it is deterministic; "
            "set --runtime.deterministic true"
        )


def differing(first: UInt32[np.ndarray, "D N"], second: UInt32[np.ndarray, "D N"]) -> tuple[int, list[int]] | None:
    """The first column in which two tables differ, and its rows that do; None where they are the same."""
    differs = first != second
    columns = np.flatnonzero(differs.any(0))
    if not len(columns):
        return None
    return int(columns[0]), np.flatnonzero(differs[:, columns[0]]).tolist()

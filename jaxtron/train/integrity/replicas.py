"""Parts of the state that several devices have, compared bit by bit (`health.compare_every`)."""

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt32

from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.names import name_of
from jaxtron.config import NoEffect
from jaxtron.optim.config import HealthConfig
from jaxtron.run.session import RunSession
from jaxtron.run.state import TrainState
from jaxtron.train.divergence import Rewind, Tell, corrupted
from jaxtron.train.hooks import StepInfo
from jaxtron.train.integrity.places import Places
from jaxtron.typing import PyTree


class Replicas:
    """Compares copies of the state after every so many steps; every process calls it, and comes to the same.

    Copies are equal for as long as their devices compute alike, whatever on_bad is. Where one is not, the run goes
    back (rewind) or ends: a state that is wrong cannot be left out. `NoEffect` where no two devices have the same.
    """

    def __init__(
        self, session: RunSession, checkpoints: Checkpoints, places: Places, health: HealthConfig, tell: Tell
    ) -> None:
        assert health.compare_every is not None
        self._session, self._checkpoints, self._places = session, checkpoints, places
        self._health, self._every, self._tell = health, health.compare_every, tell
        abstract = session.abstract_state()
        self._names = [name_of(path) for path, _ in jax.tree.leaves_with_path(abstract)]
        self._first = first_copies(abstract, places)
        self._looked_at = 0
        if (self._first == np.arange(len(self._first))[:, None]).all():
            raise NoEffect(
                "train.health.compare_every",
                health.compare_every,
                {f"mesh.{flag}": size for flag, size in session.sizes.items() if size > 1} or {"devices": 1},
                "no two devices have the same part of the state; leave it out",
            )

    def __call__(self, info: StepInfo) -> None:
        """Compare, if it is one of those steps."""
        if info.step % self._every == 0:
            self.check(info)

    def check(self, info: StepInfo) -> None:
        """Compare the copies of a state, once; `UserError` or `Rewind` where they differ."""
        if info.step == self._looked_at:
            return
        self._looked_at = info.step
        state: TrainState = info.state
        odd = odd_ones(jax.device_get(self._session.state_checksums(state)), self._first)
        if not odd.any():
            return
        arrays, rows = np.flatnonzero(odd.any(0)), np.flatnonzero(odd.any(1)).tolist()
        more = f" and {len(arrays) - 1} more" if len(arrays) > 1 else ""
        what = (
            f"after step {info.step} {self._names[arrays[0]]}{more} should be the same on several devices, and differs "
            f"on {self._places.names(rows)}"
        )
        about = {"arrays": [self._names[array] for array in arrays], **self._places.about(rows)}
        self._tell("replicas_differ", info.step, what, about)
        if self._health.on_bad == "rewind":
            raise Rewind(info.step, None, what)
        raise corrupted(self._checkpoints, info.step - 1, what)


def first_copies(abstract: PyTree, places: Places) -> Int[np.ndarray, "D N"]:
    """For each device and array, the first device with the same part of it."""
    columns = []
    for leaf in jax.tree.leaves(abstract):
        parts = leaf.sharding.devices_indices_map(leaf.shape)
        first: dict[str, int] = {}
        # a slice is no key on older Pythons
        columns.append([first.setdefault(str(parts[device]), row) for row, device in enumerate(places.devices)])
    return np.array(columns, np.int64).T


def odd_ones(sums: UInt32[np.ndarray, "D N"], first: Int[np.ndarray, "D N"]) -> Bool[np.ndarray, "D N"]:
    """Which checksums are not those of most copies of the same part; all copies where none is most."""
    odd = np.zeros(sums.shape, bool)
    differs = sums != np.take_along_axis(sums, first, 0)
    for column in np.flatnonzero(differs.any(0)):
        for group in np.unique(first[differs[:, column], column]):
            members = np.flatnonzero(first[:, column] == group)
            values, counts = np.unique(sums[members, column], return_counts=True)
            usual = values[counts.argmax()] if 2 * counts.max() > len(members) else None
            odd[members, column] = True if usual is None else sums[members, column] != usual
    return odd

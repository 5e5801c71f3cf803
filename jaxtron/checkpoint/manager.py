"""The checkpoints of a run: saved in the background, the newest kept, restored on any mesh."""

import json
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.names import signature
from jaxtron.checkpoint.record import Record
from jaxtron.checkpoint.restore import Restored, committed_steps, restore_newest, step_path
from jaxtron.checkpoint.storage import RecordingHandler, save_arguments
from jaxtron.config import UserError


class Checkpoints:
    """The checkpoints in one directory, which only this run writes; every process of the run has one.

    A `UserError` if the directory cannot be written.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory = directory.absolute()
        self.config = config
        _check_writable(self.directory)
        self._orbax = ocp.AsyncCheckpointer(RecordingHandler())
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._good = set(committed_steps(self.directory))

    def due(self, step: int) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        return self.config.every > 0 and step > 0 and step % self.config.every == 0

    def steps(self) -> list[int]:
        """The steps with a finished checkpoint that is not known to be damaged, oldest first."""
        return sorted(self._good)

    def latest_step(self) -> int | None:
        """The newest of `steps()`."""
        return max(self._good, default=None)

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Save a state of `jax.Array`s and JSON-able values; a step that is already saved is left as it is.

        Returns when the arrays may be donated, and before the files are written if `asynchronous`. An earlier save that
        failed in the background is a `UserError` here. All processes call this; the first one's `extra` is stored.
        """
        json.dumps(extra)
        self.wait()
        if step in self._good:
            return
        if jax.process_index() == 0:
            self._clear_way(step)
        arguments = save_arguments(state, Record(step, extra, signature(state)))
        with _failing_as_user_error(step, self.directory):
            self._orbax.save(step_path(self.directory, step), args=arguments)
        self._saving = (step, self._background.submit(self._finish, step))
        if not self.config.asynchronous:
            self.wait()

    def restore(self, abstract_state: PyTree) -> Restored | None:
        """Restore the newest whole checkpoint, or None where there is none; see `restore_newest`.

        A `UserError` if the directory has checkpoints and `resume` is off: they would be overwritten.
        """
        self.wait()
        if not self.config.resume:
            if self._good:
                raise UserError(
                    f"{self.directory} has checkpoints up to step {self.latest_step()} and --checkpoint.resume is off; "
                    "turn it on, or choose another --run.directory"
                )
            return None
        restored = restore_newest(self.directory, abstract_state)
        if restored:
            self._good = {step for step in self._good if step <= restored.step}
        return restored

    def wait(self) -> None:
        """Block until what was saved is on disk; a `UserError` if writing it failed."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        with _failing_as_user_error(step, self.directory):
            future.result()

    def close(self) -> None:
        """Wait, then end the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

"""The checkpoints of a run: saved in the background, the newest kept, restored on any mesh."""

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.keeping import LOSS, kept_steps, losses_of
from jaxtron.checkpoint.names import plain, signature
from jaxtron.checkpoint.processes import gather_texts
from jaxtron.checkpoint.quiet import UNCOMMITTED, forget_failed_writes, quiet_saves
from jaxtron.checkpoint.record import CheckpointRecord, Signature
from jaxtron.checkpoint.restore import Check, Restored, restore_newest, step_path
from jaxtron.checkpoint.storage import RecordingHandler, save_arguments
from jaxtron.config import UserError
from jaxtron.words import readable_bytes

_DELETING = ".deleting"
MOST_DELETIONS = 20


class Checkpoints:
    """The checkpoints in one directory, which only this run writes; every process of the run has one.

    `close` it in the end: Python may exit without finishing a save in the background. A `UserError` if the directory
    cannot be written; without `writes` it is not tried, nor the directory made.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, writes: bool = True):
        self.directory = directory.absolute()
        self.config = config
        if writes:
            _check_writable(self.directory)
        # directories are made at once, so that a full or read-only disk is noticed in `save`
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(RecordingHandler(), async_options=options)
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet_saves())
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        # by step, with the loss that decides what is kept
        self._good = losses_of(self.directory, config)
        self._removed: list[int] = []

    def steps(self) -> list[int]:
        """The steps with a finished checkpoint that is not known to be damaged, oldest first."""
        return sorted(self._good)

    def latest_step(self) -> int | None:
        """The newest of `steps()`."""
        return max(self._good, default=None)

    def save(self, step: int, state: PyTree, extra: dict[str, Any], on_disk: Signature | None = None) -> None:
        """Save a state of global `jax.Array`s, and JSON-able values; a step that is already saved is left as it is.

        `on_disk` where arrays have padding, which is not saved: the signature without it.
        Returns when the arrays may be donated, and before the files are written if `asynchronous`. An earlier save that
        failed in the background is a `UserError` here. All processes call this; the first one's `extra` is stored, its
        `validation_loss` the same on all.
        """
        # a copy: the record is written in the background
        extra = json.loads(json.dumps(extra))
        self.wait()
        if step in self._good:
            return
        arguments = save_arguments(state, CheckpointRecord(step, extra, on_disk or signature(state)))
        with self._failing_as_user_error(step):
            if jax.process_index() == 0:
                self._clear_way(step)
            self._check_room(state)
            self._orbax.save(step_path(self.directory, step), args=arguments)
        self._saving = (step, self._background.submit(self._finish, step, extra.get(LOSS)))
        if not self.config.asynchronous:
            self.wait()

    def restore(
        self, abstract_state: PyTree, check: Check = lambda _: None, on_disk: Signature | None = None
    ) -> Restored | None:
        """Restore the newest whole checkpoint, or None where there is none; arguments are those of `restore_newest`.

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
        return self.go_back(abstract_state, check, on_disk)

    def go_back(
        self, abstract_state: PyTree, check: Check = lambda _: None, on_disk: Signature | None = None
    ) -> Restored | None:
        """Restore the newest whole checkpoint of this very run, whatever `resume` says; else as `restore`."""
        self.wait()
        restored = restore_newest(self.directory, abstract_state, check, on_disk)
        if restored:
            # newer ones are damaged: they are no reason to delete this one, and are written again
            self._good = {step: loss for step, loss in self._good.items() if step <= restored.step}
        return restored

    def take_removed(self) -> list[int]:
        """The steps whose checkpoints were deleted since the last call, for they are not to be kept."""
        removed, self._removed = self._removed, []
        return removed

    def wait(self) -> None:
        """Block until what was saved is on disk; a `UserError` if writing it failed."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        with self._failing_as_user_error(step):
            future.result()

    def close(self) -> None:
        """Wait, then end the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()
            self._quiet.close()

    def _finish(self, step: int, loss: float | None) -> None:
        """In the background: wait for the commit, then delete what is not to be kept."""
        self._orbax.wait_until_finished()
        good = {**self._good, step: loss}
        kept = kept_steps(good, self.config)
        self._good = {found: good[found] for found in good if found in kept}
        for old in sorted(good.keys() - kept):
            if jax.process_index() == 0:
                _delete(step_path(self.directory, old))
            self._removed.append(old)

    def _clear_way(self, step: int) -> None:
        """Delete what a killed run left half done, and move a damaged checkpoint of this step aside."""
        for pattern in (f"step_*{UNCOMMITTED}*", f"step_*{_DELETING}"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)
        path = step_path(self.directory, step)
        if path.exists():
            path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))

    def _check_room(self, state: PyTree) -> None:
        """An `OSError` on every process if the arrays alone do not fit the disk, as the first process sees it."""
        needed = sum(plain(leaf).nbytes for leaf in jax.tree.leaves(state))
        disk = shutil.disk_usage(self.directory)
        # some file systems do not know
        lacks = disk.total > 0 and disk.free < needed
        refusal = f"it needs {readable_bytes(needed)}, and {readable_bytes(disk.free)} are left" if lacks else ""
        if refusal := gather_texts(refusal)[0]:
            raise OSError(errno.ENOSPC, refusal)

    @contextmanager
    def _failing_as_user_error(self, step: int) -> Iterator[None]:
        try:
            yield
            return
        except (OSError, ValueError) as error:
            reason = _reason(error)
        forget_failed_writes()
        self._discard(step)
        # outside of the handler: the error holds on to what failed
        raise UserError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {reason}; "
            "earlier checkpoints are untouched; make room or choose another --run.directory"
        )

    def _discard(self, step: int) -> None:
        """Delete what there is of a save that failed; its last writes may come while it is deleted."""
        name = step_path(self.directory, step).name + UNCOMMITTED
        for _ in range(MOST_DELETIONS if jax.process_index() == 0 else 0):
            leftovers = list(self.directory.glob(f"{name}*"))
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
            time.sleep(0.05)
            if not leftovers:
                return


def _reason(error: Exception) -> str:
    """What the system says in an error of Python or of TensorStore, without the long paths of unfinished files."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return (str(error) or type(error).__name__).splitlines()[0]


def _delete(path: Path) -> None:
    # renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint
    doomed = path.rename(path.with_name(path.name + _DELETING))
    shutil.rmtree(doomed)


def _check_writable(directory: Path) -> None:
    if set(str(directory)) & set("*?[]"):
        # Orbax takes its own paths for patterns, and would lose the arrays
        raise UserError(f"checkpoints cannot be written to {directory}: rename it without any of * ? [ ]")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"checkpoints cannot be written to {directory}: {error.strerror}; choose another --run.directory"
        ) from error

"""TensorBoard and Weights & Biases: the one file that imports these optional packages."""

import importlib
import math
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.run.run_config import RunConfig, TrackerName


@runtime_checkable
class Tracker(Protocol):
    """Where logged steps go besides `metrics.jsonl`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        ...

    def close(self) -> None:
        """Write out what is still held."""
        ...


def make_trackers(
    config: RunConfig, directory: Path, settings: Mapping[str, Any], *, resume_step: int = 0
) -> list[Tracker]:
    """Return the trackers of `config.trackers`, for process 0; `settings` is the resolved configuration.

    Raises UserError, with the command that installs it, where a package is missing.
    """
    # all imports come first: a missing package leaves nothing half begun
    modules = {name: import_tracker(name) for name in config.trackers}
    trackers: list[Tracker] = []
    for name, module in modules.items():
        match name:
            case "tensorboard":
                trackers.append(TensorBoardTracker(module, directory / "tensorboard", resume_step=resume_step))
            case "wandb":
                trackers.append(WandbTracker(module, directory, config.wandb_project, settings))
    return trackers


def import_tracker(name: TrackerName) -> ModuleType:
    """Return the package of a tracker; UserError, with the command that installs it, where it is missing."""
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"run.trackers names {name}, but the package {package} cannot be imported ({error}): "
            f"pip install 'jaxtron[{name}]'"
        ) from error


class TensorBoardTracker:
    """Scalars in an event file; on resume, those of steps that will be taken again are hidden.

    A thread writes them. Where it fails, on a full disk for one, the next `log` is a `UserError`: its queue, which
    nobody empties any more, would stop the run for ever.
    """

    def __init__(self, tensorboard: ModuleType, directory: Path, *, resume_step: int):
        purge_step = resume_step + 1 if resume_step > 0 else None
        self._directory = directory
        self._writer = tensorboard.SummaryWriter(str(directory), purge_step=purge_step)
        events = getattr(getattr(self._writer, "file_writer", None), "event_writer", None)
        self._worker: threading.Thread | None = getattr(events, "_worker", None)
        self._failure: BaseException | None = None
        self._previous_hook, threading.excepthook = threading.excepthook, self._remember

    def _remember(self, failed: threading.ExceptHookArgs) -> None:
        if failed.thread is not None and failed.thread is self._worker:
            self._failure = failed.exc_value
        else:
            self._previous_hook(failed)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step that are finite."""
        for name, value in _finite(metrics).items():
            if self._failure is not None:
                reason = getattr(self._failure, "strerror", None) or self._failure
                raise UserError(f"cannot write TensorBoard's events to {self._directory}: {reason}; make room")
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Write out the event file."""
        if threading.excepthook == self._remember:
            threading.excepthook = self._previous_hook
        if self._failure is None:
            self._writer.close()


class WandbTracker:
    """A run at Weights & Biases; a resumed run continues under the id kept in its directory."""

    def __init__(self, wandb: ModuleType, directory: Path, project: str, settings: Mapping[str, Any]):
        id_file = directory / "wandb_id.txt"
        if id_file.exists():
            run_id = id_file.read_text(encoding="utf-8").strip()
        else:
            run_id = secrets.token_hex(4)
            write_whole(id_file, run_id + "\n")
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=directory.name,
            dir=str(directory),
            config=dict(settings),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step that are finite."""
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}

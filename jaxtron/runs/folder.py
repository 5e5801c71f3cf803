"""A run as its directory tells it: settings, losses, checkpoints, history, and how it stands."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtron.checkpoint.record import RECORD_FILE, DamageError
from jaxtron.checkpoint.record import read as read_record
from jaxtron.config import UserError
from jaxtron.run.configuration import HISTORY_FILE, LOCK_FILE
from jaxtron.runs.losses import LossLog, read_losses
from jaxtron.runs.settings import Tree, planned_steps, read_settings
from jaxtron.words import printable

RUNNING, COMPLETE, STOPPED, DIVERGED, DAMAGED, NEW = "running", "complete", "stopped", "diverged", "damaged", "new"
STATES = (RUNNING, COMPLETE, STOPPED, DIVERGED, DAMAGED, NEW)
STEP_FOLDER = re.compile(r"step_([0-9]{8,18})")
# folders below the one that is asked for
DEPTH = 3
MOST_HISTORY = 4 << 20


@dataclass(frozen=True)
class RunFolder:
    """A run: `state` is one of `STATES`, `why` says more in words; `settings` None where they do not read."""

    directory: Path
    state: str
    why: str
    settings: Tree | None
    losses: LossLog
    checkpoints: tuple[int, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """That of its directory, as a terminal may show it."""
        return printable(self.directory.name or str(self.directory))

    @property
    def step(self) -> int | None:
        """The last step that it is known to have taken."""
        logged = [] if self.losses.last is None else [self.losses.last.step]
        return max([*self.checkpoints[-1:], *logged], default=None)

    @property
    def tokens(self) -> int | None:
        """Tokens trained on, by its last line."""
        return None if self.losses.last is None else self.losses.last.tokens

    @property
    def time(self) -> str | None:
        """When it was last heard of, UTC, as ISO text."""
        times = [entry.get("time") for entry in self.history[-1:]]
        times += [] if self.losses.last is None else [self.losses.last.time]
        return max((text for text in times if isinstance(text, str)), default=None)


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder and in folders of it, or the folder itself; a `UserError` where there are none."""
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "is not there"
        raise UserError(f"{folder} {what}; give a directory of runs, such as runs")
    found = list(_runs_in(folder, DEPTH, set()))
    if not found:
        raise UserError(f"{folder} has no runs: nothing in it was left by python -m jaxtron.train")
    return found


def _runs_in(folder: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            # a link to what was shown
            return
        seen.add((status.st_dev, status.st_ino))
        if is_run(folder):
            yield folder
        elif depth:
            for name in sorted(os.listdir(folder)):
                if not name.startswith(".") and os.path.isdir(folder / name):
                    yield from _runs_in(folder / name, depth - 1, seen)
    except OSError:
        # not ours to read, or removed meanwhile
        return


def is_run(folder: Path) -> bool:
    """Whether a training left anything in a folder, or trains there now."""
    if any(os.path.isfile(folder / name) for name in ("metrics.jsonl", HISTORY_FILE)) or _checkpoints(folder):
        return True
    return os.path.isfile(folder / LOCK_FILE) and _is_locked(folder)[0]


def open_run(directory: Path, *, deep: bool = False) -> RunFolder:
    """What is known of a run; never an error, for what does not read is told in `problems`.

    All its checkpoints are looked at if `deep`, else the newest; of each its record, not its arrays.
    """
    problems: list[str] = []
    settings = None
    try:
        settings = read_settings(directory)
    except UserError as error:
        problems.append(str(error))
    losses = read_losses(directory / "metrics.jsonl")
    if losses.problem:
        problems.append(losses.problem)
    if losses.broken:
        lines = "a line" if losses.broken == 1 else f"{losses.broken:,} lines"
        problems.append(f"metrics.jsonl has {lines} that {'is' if losses.broken == 1 else 'are'} no JSON of a step")
    history, broken = _read_history(directory / HISTORY_FILE)
    if broken:
        problems.append(broken)
    checkpoints = _checkpoints(directory)
    alone = False
    for step in checkpoints if deep else checkpoints[-1:]:
        path = directory / "checkpoints" / f"step_{step:08d}"
        try:
            if os.path.exists(path / RECORD_FILE) and not os.path.isfile(path / RECORD_FILE):
                raise DamageError(f"{RECORD_FILE} is no file")
            record = read_record(path)
            alone = bool(record.extra.get("model_alone"))
        except (DamageError, LookupError, TypeError, AttributeError, ValueError) as error:
            problems.append(f"the checkpoint of step {step} is damaged: {error}")
    run = RunFolder(directory, STOPPED, "", settings, losses, checkpoints, history, tuple(problems))
    state, why = _state(run, alone)
    return RunFolder(directory, state, why, settings, losses, checkpoints, history, tuple(problems))


def _state(run: RunFolder, is_model_alone: bool) -> tuple[str, str]:
    held, owner = _is_locked(run.directory)
    if held:
        return RUNNING, owner
    if run.problems:
        return DAMAGED, "; ".join(run.problems)
    last, planned = run.losses.last, planned_steps(run.settings)
    ended = run.history[-1] if run.history else {}
    if ended.get("ended") == DIVERGED:
        return DIVERGED, str(ended.get("reason"))
    newest = run.checkpoints[-1] if run.checkpoints else None
    if last is None and (is_model_alone or newest == 0):
        return NEW, "a model that came from elsewhere, not trained yet"
    if planned is not None and (run.step if newest is None else newest) is not None:
        if (newest if newest is not None else run.step or 0) >= planned:
            return COMPLETE, "" if newest is not None else "without a checkpoint"
    if last is not None and last.loss is None and not last.is_finite and not _passes_over_bad_steps(run.settings):
        # of a version that wrote no such line in its history
        return DIVERGED, "its last line has no finite loss"
    saved = "nothing is saved" if newest is None else f"continues from step {newest}"
    return STOPPED, f"{saved}; {owner} was killed" if owner else saved


def _passes_over_bad_steps(settings: Tree | None) -> bool:
    """Whether a loss that is not finite ends no run (`train.health.on_bad`)."""
    health = None if settings is None else settings["train"].get("health")
    return isinstance(health, dict) and health.get("on_bad", "stop") != "stop"


def _is_locked(directory: Path) -> tuple[bool, str]:
    """Whether a command trains there, and what the lock's file says of its owner.

    The lock alone tells: a file without it was left by a process that was killed.
    """
    path = directory / LOCK_FILE
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        # nobody, or not ours to know
        return False, ""
    owner = ""
    try:
        owner = printable(os.pread(lock, 200, 0).decode("utf-8", "replace").strip())
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES), owner
    finally:
        os.close(lock)
    return False, owner


def _checkpoints(directory: Path) -> tuple[int, ...]:
    """Steps of the checkpoints, in order."""
    try:
        names = os.listdir(directory / "checkpoints")
    except OSError:
        return ()
    return tuple(sorted(int(match[1]) for match in map(STEP_FOLDER.fullmatch, names) if match))


def _read_history(path: Path) -> tuple[tuple[dict[str, Any], ...], str]:
    """The entries of a history, and what is wrong with it; a last line without its end is being written."""
    try:
        if not os.path.isfile(path):
            return (), ""
        with path.open("rb") as file:
            lines = file.read(MOST_HISTORY).split(b"\n")[:-1]
    except OSError as error:
        return (), f"{path.name} cannot be read: {error.strerror}"
    entries, broken = [], 0
    for line in filter(bytes.strip, lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            broken += 1
    lines_text = "a line" if broken == 1 else f"{broken:,} lines"
    return tuple(entries), f"{path.name} has {lines_text} of no JSON object" if broken else ""

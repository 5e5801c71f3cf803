"""`metrics.jsonl`: one JSON object a logged step, `arrays.jsonl` beside it, and `events.jsonl`: docs/metrics.md."""

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Num

from jaxtron.command import write_whole
from jaxtron.config import UserError

ARRAYS_FILE, EVENTS_FILE = "arrays.jsonl", "events.jsonl"


@dataclass
class MetricsTally:
    """Tokens since the run began, and the sum of the losses of so many steps since its last line.

    Checkpoints carry it, so that lines do not depend on where a run was interrupted.
    """

    tokens: int = 0
    steps: int = 0
    loss_sum: float = 0.0

    @classmethod
    def of(cls, extra: Mapping[str, Any], sequence_length: int) -> "MetricsTally":
        """That of a checkpoint; one of an older version tells of samples alone."""
        return cls(**extra.get("tally", {"tokens": extra["position"] * sequence_length}))


class MetricsWriter:
    """Appends logged steps to a file; a line is whole on disk once `write` returns, or nothing of it: a `UserError`.

    Arrays go to a file beside it, before the line that tells of them. Both are continued at `resume_step`: lines of
    later steps, which will be taken again, are dropped first.
    """

    def __init__(self, path: Path, *, resume_step: int = 0):
        self.path = path
        self._lines = _JsonLines(path, resume_step)
        self._arrays = _JsonLines(path.with_name(ARRAYS_FILE), resume_step)

    def write(
        self,
        step: int,
        metrics: Mapping[str, float | int | str],
        arrays: Mapping[str, Num[np.ndarray, "..."] | Bool[np.ndarray, "..."]] | None = None,
    ) -> None:
        """Append one step; NaN and infinity are written as null, beside `"finite": false`."""
        if arrays:
            self._arrays.append(step, {name: _numbers(array) for name, array in arrays.items()})
        self._lines.append(step, metrics)

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        self._arrays.close()


class Events:
    """`events.jsonl` of a run: one JSON object for whatever happened to it, appended and never taken back."""

    def __init__(self, directory: Path):
        self._lines = _JsonLines(directory / EVENTS_FILE)

    def write(self, event: str, step: int, **about: Any) -> None:
        """Append an event after this step, with its time and what it concerns."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(step, {"time": now, "event": event, **about})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class _JsonLines:
    """A file of one JSON object a step, whose lines after `resume_step` are dropped (none: no line is)."""

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        if resume_step is not None:
            drop_steps_after(path, resume_step)
        self._file: FileIO | None = None

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        if any(_has_null(value) for value in line.values()):
            line["finite"] = False
        self._append(json.dumps(line, allow_nan=False).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        try:
            if self._file is None:
                # a line that was cut short stays, on its own
                line = line if _ends_well(self.path) else b"\n" + line
                # only now: a run that takes no step leaves no file
                self._file = FileIO(self.path, "a")
            start = self._file.tell()
            # unbuffered: what does not fit the disk is not tried again while closing
            if self._file.write(line) < len(line):
                self._file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room and give the same command again, which goes "
                "on from the newest checkpoint"
            ) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _ends_well(path: Path) -> bool:
    """Whether a file, if it is there, ends with the end of a line."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_metrics(path: Path) -> list[dict]:
    """Return the logged steps of a file, in order; a line cut short by a kill is left out."""
    return [record for record, _ in _read_lines(path)]


def drop_steps_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and a line cut short, in one atomic replacement."""
    if not path.exists():
        return
    kept = "".join(line for record, line in _read_lines(path) if record["step"] <= step)
    if kept.encode() == path.read_bytes():
        return
    write_whole(path, kept)


def _read_lines(path: Path) -> list[tuple[dict, str]]:
    lines = []
    if not path.exists():
        # nothing was logged yet
        return lines
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        # without its newline the next line would be appended to it
        if line.endswith("\n") and isinstance(record, dict) and type(record.get("step")) is int:
            lines.append((record, line))
    return lines


def summarize(arrays: Mapping[str, Num[np.ndarray, "..."] | Bool[np.ndarray, "..."]]) -> dict[str, float]:
    """Mean, least and largest of each array as NAME_mean, NAME_min and NAME_max; nothing of an empty one."""
    found: dict[str, float] = {}
    for name, array in arrays.items():
        if array.size:
            # a mean of numbers that are too large for their own type is none
            wide = array.astype(np.float64)
            found |= {
                f"{name}_mean": wide.mean().item(),
                f"{name}_min": wide.min().item(),
                f"{name}_max": wide.max().item(),
            }
    return found


def _numbers(array: np.ndarray) -> Any:
    """An array as nested lists, with the digits of float32."""
    if array.dtype.kind in "biu":
        return array.tolist()
    digits = np.array([float(str(number)) for number in array.astype(np.float32).ravel()], np.float64)
    return digits.reshape(array.shape).tolist()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if isinstance(value, str) or math.isfinite(value) else None


def _has_null(value: Any) -> bool:
    return any(map(_has_null, value)) if isinstance(value, list) else value is None

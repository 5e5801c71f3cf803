"""`metrics.jsonl`: one JSON object a logged step; docs/metrics.md says what its names mean."""

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from jaxtron.command import write_whole
from jaxtron.config import UserError


@dataclass
class Tally:
    """Tokens since the run began, and the sum of the losses of so many steps since its last line.

    Checkpoints carry it, so that lines do not depend on where a run was interrupted.
    """

    tokens: int = 0
    steps: int = 0
    loss_sum: float = 0.0

    @classmethod
    def of(cls, extra: Mapping[str, Any], sequence_length: int) -> "Tally":
        """That of a checkpoint; one of an older version tells of samples alone."""
        return cls(**extra.get("tally", {"tokens": extra["position"] * sequence_length}))


class MetricsWriter:
    """Appends logged steps to a file; a line is whole on disk once `write` returns, or nothing of it: a `UserError`.

    The file is continued at `resume_step`: lines of later steps, which will be taken again, are dropped first.
    """

    def __init__(self, path: Path, *, resume_step: int = 0):
        self.path = path
        drop_steps_after(path, resume_step)
        self._file: FileIO | None = None

    def write(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Append one step; NaN and infinity are written as null, beside `"finite": false`."""
        line: dict[str, float | int | str | bool | None] = {"step": step}
        for name, value in metrics.items():
            line[name] = value if isinstance(value, str) or math.isfinite(value) else None
        if None in line.values():
            line["finite"] = False
        self._append(json.dumps(line, allow_nan=False).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        try:
            # only now: a run that takes no step leaves no file
            self._file = self._file or FileIO(self.path, "a")
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

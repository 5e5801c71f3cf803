"""The losses in a `metrics.jsonl` of any size, whatever state it is in: whole where it is small, else a sample.

A run that is being trained writes to the file meanwhile, and a kill leaves half a line: what does not read is left out.
"""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

# a larger file is sampled: so many lines of it, evenly, its beginning and its end
WHOLE_BYTES = 32 << 20
SAMPLES = 2_000
TAIL_BYTES = 1 << 16
# a longer line is none of ours
LONGEST_LINE = 1 << 20
LARGEST = 3.5e38


@dataclass(frozen=True)
class LossLine:
    """What a line of `metrics.jsonl` says: losses in nats a token (none: not measured, or not finite)."""

    step: int
    tokens: int | None = None
    loss: float | None = None
    validation: float | None = None
    time: str | None = None
    is_finite: bool = True

    def at(self, by: str) -> int | None:
        """Where it lies: its `step`, or its `tokens`."""
        return self.step if by == "step" else self.tokens


@dataclass(frozen=True)
class LossLog:
    """The lines of a file in order of their steps, of a step the last.

    `broken` lines do not read, the last one apart, which may be written at this moment. Of a sample it counts those
    that were come upon.
    """

    path: Path
    lines: tuple[LossLine, ...] = ()
    broken: int = 0
    is_sample: bool = False
    problem: str = ""

    @property
    def last(self) -> LossLine | None:
        """The line of the last step."""
        return self.lines[-1] if self.lines else None

    def best(self, name: str) -> LossLine | None:
        """The first line with the least `loss` or `validation`."""
        found = [line for line in self.lines if getattr(line, name) is not None]
        return min(found, key=lambda line: getattr(line, name), default=None)

    def latest(self, name: str) -> float | None:
        """The last `loss` or `validation` that was measured."""
        return next((getattr(line, name) for line in reversed(self.lines) if getattr(line, name) is not None), None)

    def points(self, name: str, by: str = "step") -> list[tuple[int, float]]:
        """Places and values of the lines that have a `loss` or `validation`."""
        found = ((line.at(by), getattr(line, name)) for line in self.lines)
        return [(place, value) for place, value in found if place is not None and value is not None]

    def find(self, place: int, by: str = "step") -> LossLine | None:
        """The line at a step or number of tokens, of a sample looked up in the file."""
        found = self._by_place[by].get(place)
        return found if found is not None or not self.is_sample else _bisect(self.path, place, by)

    @cached_property
    def _by_place(self) -> dict[str, dict[int | None, LossLine]]:
        return {by: {line.at(by): line for line in self.lines} for by in ("step", "tokens")}


@dataclass
class _Reader:
    """Lines as they come; half ones at an end of what was read are no broken ones."""

    by_step: dict[int, LossLine] = field(default_factory=dict)
    broken: int = 0

    def take(self, line: bytes) -> None:
        if not line.strip():
            return
        read = parse(line)
        if read is None:
            self.broken += 1
        else:
            self.by_step[read.step] = read

    @property
    def lines(self) -> tuple[LossLine, ...]:
        return tuple(self.by_step[step] for step in sorted(self.by_step))


def read_losses(path: Path, *, whole_bytes: int = WHOLE_BYTES, samples: int = SAMPLES) -> LossLog:
    """The losses of a file; nothing of one that is not there, and `problem` in words for one that cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return LossLog(path, problem=f"{path.name} is no file")
        reader = _Reader()
        if status.st_size <= whole_bytes:
            # what is after the last newline is being written
            for line in path.read_bytes().split(b"\n")[:-1]:
                reader.take(line)
            return LossLog(path, reader.lines, reader.broken)
        with path.open("rb") as file:
            for line in _sampled(file, status.st_size, samples):
                reader.take(line)
        return LossLog(path, reader.lines, reader.broken, is_sample=True)
    except FileNotFoundError:
        return LossLog(path)
    except OSError as error:
        return LossLog(path, problem=f"{path.name} cannot be read: {error.strerror}")


def parse(line: bytes) -> LossLine | None:
    """What a line says; None if it is none of ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None
    tokens, time = record.get("tokens"), record.get("time")
    return LossLine(
        record["step"],
        tokens if type(tokens) is int else None,
        _number(record.get("loss")),
        _number(record.get("validation_loss")),
        time if isinstance(time, str) else None,
        record.get("finite") is not False,
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    # losses are float32
    return number if abs(number) < LARGEST else None


def _sampled(file: Any, size: int, samples: int) -> Iterator[bytes]:
    """Whole lines at even places of a file, the first one, and all of its end."""
    for number in range(samples):
        file.seek(size * number // samples)
        if number:
            file.readline(LONGEST_LINE)
        line = file.readline(LONGEST_LINE)
        if line.endswith(b"\n"):
            yield line
    file.seek(max(0, size - TAIL_BYTES))
    # the first is half a line, and the last may be
    yield from file.read(TAIL_BYTES).split(b"\n")[1:-1]


def _bisect(path: Path, place: int, by: str) -> LossLine | None:
    """The line at a place of a file whose lines are in order; None if there is none."""
    try:
        with path.open("rb") as file:
            low, high = 0, os.fstat(file.fileno()).st_size
            while low < high:
                middle = (low + high) // 2
                file.seek(middle)
                if middle:
                    # a line that begins exactly here is the next one of the byte before
                    file.seek(middle - 1)
                    file.readline(LONGEST_LINE)
                read = parse(file.readline(LONGEST_LINE))
                found = None if read is None else read.at(by)
                if found is None or found > place:
                    high = middle
                elif found < place:
                    low = file.tell()
                else:
                    return read
    except OSError:
        # gone since it was sampled
        return None
    return None

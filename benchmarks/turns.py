"""Ours and another's of one thing in two processes on the same cores, which take turns.

Ratios are of neighbouring turns, so that whatever else the machine does meets both; processor time is what it counts of
each process, whatever ran beside it.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from jaxtron.config import UserError


class Side(Protocol):
    """Who takes a turn when told to."""

    def take(self, count: int) -> dict[str, Any]:
        """`seconds` and `processor` seconds of so many of what is measured, and what it came to."""
        ...


class OtherProcess:
    """A script under another Python, which `needs` packages. Used as a context, which leaves none behind.

    The script says a line of JSON when it is ready, and one for each number that it reads. `UserError` where it ends
    by itself.
    """

    def __init__(self, python: str, script: Path, words: Sequence[str], threads: int, *, needs: str) -> None:
        self._needs = needs
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        try:
            self._process = subprocess.Popen([python, str(script), *words], env=environment, **pipes)
        except OSError as error:
            raise UserError(f"--benchmark.torch {python} cannot be started: {error.strerror}") from None

    def __enter__(self) -> "OtherProcess":
        self.versions = self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._process.kill()
        self._process.communicate()

    def take(self, count: int) -> dict[str, Any]:
        """As a `Side`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise UserError(f"PyTorch's process ended; --benchmark.torch has to be a Python with {self._needs}")
        return json.loads(line)


@dataclass(frozen=True)
class Turns:
    """What each side's turns took, and how busy the machine was."""

    taken: Mapping[str, Sequence[Mapping[str, float]]]
    loads: Sequence[float]

    def milliseconds(self, name: str, count: int) -> dict[str, dict[str, float]]:
        """Of one of the `count` of a turn, by side: median, least and most of the turns."""
        found = {}
        for side, turns in self.taken.items():
            each = [1e3 * one[name] / count for one in turns]
            found[side] = {
                "median": round(float(np.median(each)), 2),
                "min": round(min(each), 2),
                "max": round(max(each), 2),
            }
        return found

    def ratios(self, side: str, other: str, name: str) -> dict[str, float]:
        """Median and quartiles of what a side takes of what the other does, turn by turn."""
        pairs = zip(self.taken[side], self.taken[other], strict=True)
        found = [one[name] / two[name] for one, two in pairs]
        parts = (("p25", 25), ("median", 50), ("p75", 75))
        return {part: round(float(np.percentile(found, percent)), 3) for part, percent in parts}

    def load_average(self) -> dict[str, float]:
        """Processes that ran or waited, of the last minute before each pair."""
        return {"least": min(self.loads), "most": max(self.loads)}


def take_turns(sides: Mapping[str, Side], count: int, pairs: int) -> Turns:
    """So many turns of each side, one after the other."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    loads = []
    for _ in range(pairs):
        loads.append(os.getloadavg()[0])
        for name, side in sides.items():
            taken[name].append(side.take(count))
    return Turns(taken, loads)


def take_cores(threads: int) -> None:
    """Leaves this process, and those that it starts, so many cores and JAX as many threads; before JAX starts."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        raise UserError(f"--benchmark.threads {threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores)
    os.environ["PJRT_NPROC"] = str(len(cores))

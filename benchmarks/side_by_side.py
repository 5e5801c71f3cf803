"""Implementations of one thing side by side: in a process of their own, in turns, judged by what they did."""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

# told who runs next: whoever ends or hangs the process is then known
Begins = Callable[[str], None]
# what is aimed at: so many times the fastest of the others
AIM = 1.05
# seconds without a sign of life after which a kernel hangs: compiling a case's programs is the longest step
PATIENCE = 90.0
# in a section of `benchmarks.gpu`, whose seconds this variable has, a hang costs no more than this part of them
SECTION_SECONDS = "JAXTRON_SECTION_SECONDS"
PATIENCE_PART = 0.25
# seconds that compiling a case may take all the same
LEAST_PATIENCE = 20.0
# an implementation that hung so often is not waited for again
MOST_HANGS = 2
# characters of an error: a compiler's has its reason far behind
LONGEST_ERROR = 2000

# a dataclass whose `flops` are those of one direction
Measured = Any
Judge = Callable[[Mapping[str, Any]], dict[str, Any]]


def report(
    cases: Sequence[Measured],
    run: Callable[[Any], Mapping[str, Any]],
    absent: Mapping[str, str],
    judge: Judge,
) -> dict[str, Any]:
    """Prints and returns every case with, of each implementation, what `run` measured or why there is nothing."""
    result: dict[str, Any] = {"absent_implementations": dict(absent), "cases": []}
    for case in cases:
        found = dict(run(case))
        entry = {**asdict(case), "flops": case.flops, "implementations": found}
        result["cases"].append({**entry, "judged": judge(entry)})
        print(json.dumps(result), flush=True)
    return result


def merged(case_type: type[Any], sections: Sequence[Mapping[str, Any]], judge: Judge) -> list[dict[str, Any]]:
    """The cases of several processes' reports, each with all implementations, judged anew."""
    cases: dict[Any, dict[str, Any]] = {}
    for entry in (entry for section in sections for entry in section["cases"]):
        case = case_type(**{name: entry[name] for name in case_type.__dataclass_fields__})
        one = cases.setdefault(case, {**entry, "implementations": {}})
        one["implementations"] |= entry["implementations"]
    return [{**entry, "judged": judge(entry)} for entry in cases.values()]


def agreement(measured: Mapping[str, Any], most: float) -> bool | None:
    """Whether no result of an implementation differs from another's by more than this; None where none was compared."""
    distances = measured.get("differs", {}).values()
    # not-a-number agrees with nothing
    return all(distance <= most for distance in distances) if distances else None


def compare(speed: float | None, others: Mapping[str, float | None], target: float | None) -> dict[str, Any]:
    """TFLOP/s against the fastest of the others, and against a target; None is what is not known."""
    speeds = {name: tflops for name, tflops in others.items() if tflops is not None}
    best = max(speeds, key=speeds.__getitem__, default=None)
    ratio = None if speed is None or best is None else speed / speeds[best]
    return {
        "tflops": speed,
        "best_of_others": best,
        "ratio": ratio,
        "aim_met": None if ratio is None else ratio >= AIM,
        "target": target,
        "target_met": None if speed is None or target is None else speed >= target,
    }


def timed(times: Sequence[float], flops: float) -> dict[str, Any]:
    """Median, fastest and slowest of some rounds' seconds a call, and TFLOP/s at the median."""
    median = float(np.median(times))
    return {
        "milliseconds": {"median": 1e3 * median, "min": 1e3 * min(times), "max": 1e3 * max(times)},
        "tflops": 1e-12 * flops / median,
    }


def section_patience(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds without a sign of life after which a kernel hangs: fewer in a section that has little time."""
    section = environment.get(SECTION_SECONDS)
    return PATIENCE if section is None else min(PATIENCE, max(LEAST_PATIENCE, PATIENCE_PART * float(section)))


class Worker:
    """Measures cases in another process: one that a kernel ends or hangs is replaced, and the others still count.

    An implementation that hung in two cases has no further ones: each would cost `patience` seconds again.
    """

    def __init__(self, command: Sequence[str], names: Sequence[str], *, patience: float | None = None) -> None:
        self.command, self.names = command, names
        self.patience = section_patience() if patience is None else patience
        self.process: subprocess.Popen[str] | None = None
        self._hangs: Counter[str] = Counter()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def measure(self, case: Measured) -> dict[str, Any]:
        """Figures of each implementation; where one ended the process, that one's end and the others' figures."""
        hung = [name for name in self.names if self._hangs[name] >= MOST_HANGS]
        refused: dict[str, Any] = {name: {"error": f"not tried: it hung {MOST_HANGS} times before"} for name in hung}
        while left := [name for name in self.names if name not in refused]:
            found, began, why, hangs = self._ask(json.dumps({"case": asdict(case), "implementations": left}))
            if found is not None:
                return refused | found
            # while all were compiled, or timed in turns: whoever it was
            blamed = [began] if began in left else left
            refused |= dict.fromkeys(blamed, {"error": why})
            if hangs:
                self._hangs.update(blamed)
        return refused

    def _ask(self, question: str) -> tuple[dict[str, Any] | None, str | None, str, bool]:
        """The answer, or None with who was running last, what happened, and whether it was a hang."""
        if self.process is not None and self.process.poll() is not None:
            self._stop()
        if self.process is None:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
            self.process = subprocess.Popen(self.command, **pipes)
            # libraries, and the first touch of a GPU
            seconds = max(PATIENCE, self.patience)
        else:
            seconds = self.patience
        process, began, why, hung = self.process, None, "", threading.Event()
        assert process.stdin is not None and process.stdout is not None

        def end() -> None:
            hung.set()
            process.kill()

        timer = _started(seconds, end)
        try:
            process.stdin.write(question + "\n")
            for line in process.stdout:
                said = _said(line)
                began, why = said.get("begins", began), said.get("ended", why)
                if "measured" in said:
                    return said["measured"], None, "", False
                seconds = self.patience if said else seconds
                timer.cancel()
                timer = _started(seconds, end)
        finally:
            timer.cancel()
        code = process.wait()
        self._stop()
        if hung.is_set():
            return None, began, f"no sign of life for {seconds:.0f} s", True
        return None, began, f"its process ended with code {code} {why}".rstrip(), False

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            # closes the pipes, and waits
            self.process.communicate()
            self.process = None


def _started(seconds: float, end: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _said(line: str) -> dict[str, Any]:
    """What a worker says; libraries may print too."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def serves(argv: Sequence[str], purpose: str | None) -> bool:
    """Whether the command line is a worker's."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("serve", nargs="?", choices=["serve"], help="measure the cases that come on standard input")
    return parser.parse_args(argv).serve is not None


def serve(case_type: type[Any], measure: Callable[[Any, Sequence[str], Begins], Mapping[str, Any]]) -> None:
    """A worker's end of the conversation: a case a line, until there are no more or a failure cannot be survived."""

    def say(**said: Any) -> None:
        print(json.dumps(said), flush=True)

    say(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = measure(case_type(**asked["case"]), asked["implementations"], lambda name: say(begins=name))
        except Exception as error:
            say(ended=_words(error))
            raise
        say(measured=found)
        # an error's traceback holds arrays in a cycle
        gc.collect()


class recorded:
    """Keeps why an implementation has no figures: a library refuses in its own way, and the others still count."""

    def __init__(self, name: str, refused: dict[str, Any]) -> None:
        self.name, self.refused = name, refused

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.refused[self.name] = {"error": _words(error)}
        return isinstance(error, Exception)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_ERROR]


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    wait: Callable[[Any], Any],
    *,
    rounds: int = 10,
    round_seconds: float = 0.04,
) -> dict[str, list[float]]:
    """Seconds of a call of each, one for every round; calls are in flight together, so that no dispatch is timed."""
    calls = {}
    for name, function in functions.items():
        for _ in range(2):
            wait(function())
        start = time.perf_counter()
        wait(function())
        calls[name] = min(max(math.ceil(round_seconds / (time.perf_counter() - start)), 1), 200)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                last = function()
            wait(last)
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return seconds

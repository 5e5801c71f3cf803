"""`make fuzz`: damaged inputs by the thousand, each through the command or function that reads it, in this process.

A case is a function of the seed and its number. It must end in a `UserError` of one line that names the file, or be
taken where no rule could tell it from a good one: never another exception, a hang or a huge allocation. Cases run in
workers, so that one that ends its process is a finding too; the log has a line a case.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtron.__main__ import main as jaxtron
from tests.faults.bounds import TooLong, bounded
from tests.faults.inputs import TARGETS, Flags, Target, write_inputs
from tests.support.commands import Ended, run_main
from tests.sweep.sweep_cases import STARTED, Result, WorkStarted, error_faults, nothing_starts, snapshot

CASES, SEED = 10_000, 20
REFUSED, ACCEPTED, FINDING = "refused", "accepted", "finding"
BATCH = 2000
HANG_SECONDS = 900.0
MOST_BYTES = 600 << 20


@dataclass(frozen=True)
class Verdict:
    """What became of a case; `bytes` is the most memory that it took, `seconds` are of its process's CPU."""

    case: int
    target: str
    verdict: str
    why: str
    seconds: float = 0.0
    bytes: int = 0


class Bench:
    """The workplace that one case after the other damages, whole again after each; it is the working directory."""

    def __init__(self, place: Path) -> None:
        self._template, self.folder = place / "template" / "workplace", place / "copy" / "workplace"
        write_inputs(self._template)
        shutil.copytree(self._template, self.folder)
        self._whole = snapshot(self.folder)
        self._outcomes: dict[str, Any] = {}

    def run(self, seed: int, number: int, target: Target | Flags | None = None) -> Verdict:
        """The case of a number; of this target, if it is given."""
        chance = random.Random(f"{seed}/{number}")
        one = target or TARGETS[number % len(TARGETS)]
        begun = time.process_time()
        with bounded() as spent:
            verdict, why = self._flags(one, chance) if isinstance(one, Flags) else self._file(one, chance)
        if spent.bytes > MOST_BYTES:
            verdict, why = FINDING, f"took {spent.bytes >> 20} MiB, {why}"
        self._mend()
        return Verdict(number, one.name, verdict, why, round(time.process_time() - begun, 3), spent.bytes)

    def _flags(self, one: Flags, chance: random.Random) -> tuple[str, str]:
        words, wrong = one.words(chance)
        result, _ = self._read(words)
        return self._judged(result, ("",), wrong, " ".join(words)[:300])

    def _file(self, one: Target, chance: random.Random) -> tuple[str, str]:
        path = self.folder / one.file
        whole = path.read_bytes()
        if one.is_whole and one.name not in self._outcomes:
            self._outcomes[one.name] = self._read(one.read)[1]
        content = one.damaged(whole, chance)
        path.write_bytes(content)
        wrong = None if content == whole or one.rule is None else one.rule(path)
        result, value = self._read(one.read)
        if one.is_whole and wrong is None and result.ended.code == 0 and value != self._outcomes[one.name]:
            wrong = "it gives something else than the whole file"
        path.write_bytes(content)
        return self._judged(result, one.named, wrong, f"{content[:120]!r} ({len(content)} bytes, {len(whole)} before)")

    def _judged(self, result: Result, named: tuple[str, ...], wrong: str | None, what: str) -> tuple[str, str]:
        if result.ended.code == 0 and not result.defects:
            if wrong is not None:
                return FINDING, f"taken for good: {wrong}; {what}"
            return ACCEPTED, ""
        faults = error_faults(result, named)
        said = result.ended.err.strip().splitlines()[-1:] or [""]
        return (FINDING, f"{'; '.join(faults)}; {what}") if faults else (REFUSED, said[0][:200])

    def _read(self, read: Any) -> tuple[Result, Any]:
        """How a command, or a function as one, ended, and what the function gave."""
        before, defects, ended, given = snapshot(self.folder), [], STARTED, []
        words, function = (read, None) if isinstance(read, tuple) else ((), read)
        main = jaxtron if function is None else lambda _: given.append(function())
        with warnings.catch_warnings(record=True) as warned, nothing_starts(), contextlib.chdir(self.folder):
            warnings.simplefilter("always")
            try:
                ended = run_main(main, words)
            except WorkStarted:
                pass
            except TooLong:
                defects.append("used up its CPU seconds")
            # a library in Rust has an exception of its own for a panic
            except (Exception, SystemExit) as error:
                defects.append(f"a traceback: {_described(error)}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                defects.append(f"a panic: {_described(error)}")
        if not words:
            # what is logged on the way is no part of an error
            ended = Ended(ended.code, "", "".join(ended.err.splitlines(keepends=True)[-1:]))
        defects += [f"a warning: {warning.message}" for warning in warned]
        return Result(ended, tuple(defects), before, snapshot(self.folder)), given[0] if given else None

    def _mend(self) -> None:
        """Makes the workplace whole again."""
        found = snapshot(self.folder)
        for name in sorted(found.keys() - self._whole.keys(), reverse=True):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        for name, content in self._whole.items():
            if found.get(name) != content:
                path = self.folder / name
                path.mkdir(exist_ok=True) if content == "folder" else shutil.copyfile(self._template / name, path)


def _described(error: BaseException) -> str:
    """An error with the line of the program that it came from."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "jaxtron/" in code.co_filename:
            place = f" at jaxtron/{code.co_filename.rpartition('jaxtron/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]}{place}"


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A bench in a folder of its own, with its caches."""
    with tempfile.TemporaryDirectory(prefix="faults") as place:
        kept = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        try:
            yield Bench(Path(place))
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            os.environ |= {} if kept is None else {"XDG_CACHE_HOME": kept}


def finished(log: Path) -> dict[int, dict[str, Any]]:
    """The lines of a log by the numbers of their cases; one cut short is of a worker that died."""
    found = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            found[json.loads(line)["case"]] = json.loads(line)
    return found


def work(log: Path, seed: int, numbers: list[int]) -> None:
    """Runs these cases, a line of the log each."""
    with bench() as one, log.open("a") as file:
        for number in numbers:
            file.write(json.dumps(asdict(one.run(seed, number))) + "\n")
            file.flush()


def run(log: Path, *, seed: int, numbers: list[int], minutes: float) -> None:
    """All cases that the log has not, in workers that come one after the other; one that dies is the case's verdict."""
    end = time.monotonic() + 60 * minutes
    log.parent.mkdir(parents=True, exist_ok=True)
    while time.monotonic() < end and (left := sorted(set(numbers) - finished(log).keys())):
        part = left[:BATCH]
        words = [sys.executable, "-m", "tests.faults", "fuzz", "--log", str(log), "--seed", str(seed)]
        worker = subprocess.Popen([*words, "--worker", json.dumps(part)])
        size, moved = -1, time.monotonic()
        while worker.poll() is None:
            time.sleep(0.5)
            if (now := log.stat().st_size if log.exists() else 0) != size:
                size, moved = now, time.monotonic()
            if time.monotonic() - moved > HANG_SECONDS or time.monotonic() > end:
                worker.kill()
                worker.wait()
        hung = time.monotonic() - moved > HANG_SECONDS
        if worker.returncode and (hung or time.monotonic() < end):
            first = min(set(part) - finished(log).keys(), default=None)
            if first is not None:
                why = "hung" if hung else f"its process ended with {worker.returncode}"
                name = TARGETS[first % len(TARGETS)].name
                with log.open("a") as file:
                    file.write("\n" + json.dumps(asdict(Verdict(first, name, FINDING, why))) + "\n")


def summary(lines: list[dict[str, Any]]) -> str:
    """Verdicts by target, then the findings."""
    targets: dict[str, Counter[str]] = {}
    for line in lines:
        targets.setdefault(line["target"], Counter())[line["verdict"]] += 1
    rows = [f"{'':34}{REFUSED:>9}{ACCEPTED:>10}{FINDING:>9}"]
    for name, counts in sorted(targets.items()):
        rows.append(f"{name:34}{counts[REFUSED]:9,}{counts[ACCEPTED]:10,}{counts[FINDING]:9,}")
    total = Counter(line["verdict"] for line in lines)
    rows.append(f"{'all':34}{total[REFUSED]:9,}{total[ACCEPTED]:10,}{total[FINDING]:9,}")
    if lines:
        seconds, most = [line["seconds"] for line in lines], max(line["bytes"] for line in lines)
        rows.append(f"{sum(seconds):,.0f} CPU seconds, at most {max(seconds):.1f} and {most >> 20} MiB a case")
    found = [line for line in lines if line["verdict"] == FINDING]
    rows += [f"{line['case']} {line['target']}: {line['why']}" for line in found]
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    """Runs the cases; 1 where there is a finding."""
    parser = argparse.ArgumentParser(description="Damaged inputs, each refused in one line or as good as good ones.")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", metavar="TARGET", help="cases of this target alone")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so many")
    parser.add_argument("--log", type=Path, default=Path("build/fuzz.jsonl"))
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        work(given.log, given.seed, given.worker)
        return 0
    numbers = [n for n in range(given.cases) if given.only in (None, TARGETS[n % len(TARGETS)].name)]
    run(given.log, seed=given.seed, numbers=numbers, minutes=given.minutes)
    wanted = set(numbers)
    lines = [line for number, line in sorted(finished(given.log).items()) if number in wanted]
    print(summary(lines))
    return int(len(lines) < len(numbers) or any(line["verdict"] == FINDING for line in lines))

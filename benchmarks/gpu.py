"""`python -m benchmarks.gpu`: everything worth measuring on a machine with NVIDIA GPUs, in one JSON."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from benchmarks import attention, grouped_matmul, record, ssd
from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError
from jaxtron.runtime.devices import expects_gpu

Section = Literal[
    "tests",
    "ceilings",
    "attention_jax",
    "attention_torch",
    "grouped_jax",
    "grouped_torch",
    "ssd_jax",
    "ssd_torch",
    "train",
]

# seconds of each in the default nine minutes, right answers first; of more or less time each has its share, and what
# one leaves over is shared among those after it
SHARES: dict[Section, int] = {
    "tests": 150,
    "ceilings": 25,
    "attention_jax": 115,
    "attention_torch": 40,
    "grouped_jax": 55,
    "grouped_torch": 20,
    "ssd_jax": 40,
    "ssd_torch": 15,
    "train": 80,
}
# seconds in which a section whose time is over may still say what it has
GRACE = 10.0
# beyond these, processes wait for each other on the one GPU
MOST_TEST_PROCESSES = 8
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
_ANY = "|".join(OUTCOMES)
# a line of pytest -v, in several processes and in one
_OUTCOME = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] ({_ANY}) (.+)|(\S+::.+) ({_ANY})(?: \(.*\))? +\[ *\d+%\])$")
# how many tests it runs, in the order of preference
_SELECTED = (r"/ (\d+) selected", r"\[(\d+) items?\]", r"collected (\d+) items?")


class GpuBenchmark(Config):
    """What `python -m benchmarks.gpu` measures."""

    config: str = "configs/gpt_1b.yaml"
    """The run whose train step is measured."""
    sections: tuple[Section, ...] = tuple(SHARES)
    """Which parts, in this order; each has a process of its own, so that one crash does not lose the rest."""
    minutes: float = Field(9.0, gt=0)
    """All sections end within this, each with its share; what was measured until a section's end is kept."""
    output: str | None = None
    """A .json file, or a folder that gets <date>-<device>-gpu.json (none: $OUT, else benchmarks/results)."""


def main(argv: list[str]) -> int:
    """Runs the sections, keeping the file complete after each; 1 if one failed."""
    purpose = "Benchmark this machine's NVIDIA GPUs."
    config = configure(GpuBenchmark, argv, program="python -m benchmarks.gpu", purpose=purpose)
    if config is None:
        return 0
    if not expects_gpu():
        raise UserError("no NVIDIA GPU that JAX would use: it takes a driver and jax[cuda12] or jax[cuda13]")
    names = record.gpu_names() or ["unknown GPU"]
    path = record.destination(config.output or os.environ.get("OUT") or str(record.RESULTS), "gpu", names[0])
    result = {"benchmark": "gpu", **record.circumstances("gpu", names[0], len(names)), "sections": {}}
    deadline = time.monotonic() + 60 * config.minutes
    for number, section in enumerate(config.sections):
        seconds = share(config.sections[number:], deadline - time.monotonic())
        outcome = run_section(command(section, config), seconds)
        result["sections"][section] = outcome
        result["attention"] = attention.merged(results_of(result, "attention"))
        result["grouped"] = grouped_matmul.merged(results_of(result, "grouped"))
        result["ssd"] = ssd.merged(results_of(result, "ssd"))
        record.write(path, result)
        print(f"{section}: {outcome['status']} {outcome.get('reason', '')}".strip(), flush=True)
    print(f"written to {path}")
    return int(any(outcome["status"] in ("failed", "timeout") for outcome in result["sections"].values()))


def share(sections: Sequence[Section], seconds: float) -> float:
    """Of the seconds left, what the first of these sections may take."""
    return seconds * SHARES[sections[0]] / sum(SHARES[section] for section in sections)


def results_of(result: dict[str, Any], what: Literal["attention", "grouped", "ssd"]) -> list[dict[str, Any]]:
    """What a GPU's result has of attention, grouped products or state-space duality, complete or not."""
    found = (result.get("sections", {}).get(f"{what}_{by}", {}).get("result") for by in ("jax", "torch"))
    return [section for section in found if section]


def command(section: Section, config: GpuBenchmark) -> list[str]:
    """What a section runs."""
    module = {
        "tests": ["pytest", *_pytest_words()],
        "ceilings": ["benchmarks.ceilings"],
        "attention_jax": ["benchmarks.attention"],
        "attention_torch": ["benchmarks.attention_torch"],
        "grouped_jax": ["benchmarks.grouped_matmul"],
        "grouped_torch": ["benchmarks.grouped_matmul_torch"],
        "ssd_jax": ["benchmarks.ssd"],
        "ssd_torch": ["benchmarks.ssd_torch"],
        "train": ["benchmarks.train", config.config],
    }[section]
    return [sys.executable, "-m", *module]


def _pytest_words() -> list[str]:
    """All tests that are marked for a GPU: most of their time is compilation, which more processes share."""
    files = sorted(path for path in (record.ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    processes = min(os.cpu_count() or 1, MOST_TEST_PROCESSES)
    parallel = ["-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 1 else []
    # one file that cannot be imported does not keep the others from running
    options = ["-v", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider", *parallel]
    return ["-m", "gpu", *options, *(str(path.relative_to(record.ROOT)) for path in files)]


def run_section(words: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs a command for at most `seconds`; its JSON as `result`, or a status that says what is missing and why.

    What it printed before its time was over is kept, as `incomplete`.
    """
    if seconds < 1:
        return {"status": "skipped", "reason": "no time was left"}
    start = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=record.ROOT,
        env=os.environ | _environment(words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    grace = min(GRACE, seconds / 4)
    try:
        stdout, stderr = process.communicate(timeout=seconds - grace)
        outcome = _read(words, process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        stdout, stderr = _end(process, grace)
        outcome = {"status": "timeout", "reason": f"ended after {seconds - grace:.0f} s", "stderr": _tail(stderr)}
        found = _printed(words, stdout)
        if found is not None:
            outcome |= {"incomplete": True, "result": found}
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def _environment(words: Sequence[str]) -> dict[str, str]:
    if "pytest" not in words:
        return {"PYTHONUNBUFFERED": "1"}
    # several processes on one GPU: none may take most of its memory for itself
    return {
        "PYTHONUNBUFFERED": "1",
        "JAXTRON_TEST_PLATFORM": "cuda",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def _end(process: subprocess.Popen[str], grace: float) -> tuple[str, str]:
    """Interrupts a process, so that pytest tells of failures, then kills it with all that it started."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.communicate(timeout=grace)
    except subprocess.TimeoutExpired:
        # the session that it leads
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def _read(words: Sequence[str], code: int, stdout: str, stderr: str) -> dict[str, Any]:
    found = _printed(words, stdout)
    if "pytest" in words:
        if code == 5:
            return {"status": "absent", "reason": "there are no tests marked gpu"}
        return (
            {"status": "failed", "stderr": _tail(stderr), "result": found}
            if code
            else {"status": "ok", "result": found}
        )
    kept = {} if found is None else {"incomplete": True, "result": found}
    if code:
        return {"status": "failed", "reason": f"exit code {code}", "stderr": _tail(stderr), **kept}
    if found is None:
        return {"status": "failed", "reason": "it printed no JSON", "stderr": _tail(stderr)}
    if "absent" in found:
        return {"status": "absent", "reason": found["absent"]}
    return {"status": "ok", "result": found}


def _printed(words: Sequence[str], stdout: str) -> dict[str, Any] | None:
    """What a section measured according to its output: pytest's outcomes, else the last whole JSON object."""
    if "pytest" in words:
        return outcomes(stdout)
    for start in reversed([match.start() for match in re.finditer(r"^\{", stdout, re.MULTILINE)]):
        try:
            return json.JSONDecoder().raw_decode(stdout, start)[0]
        except ValueError:
            # cut off where the section ended
            continue
    return None


def outcomes(report: str) -> dict[str, Any]:
    """Of pytest's verbose report, whole or not: how many tests there are of each outcome, and which failed."""
    found: dict[str, str] = {}
    for line in report.splitlines():
        if match := _OUTCOME.match(line):
            found[(match[2] or match[3]).strip()] = match[1] or match[4]
    selected = next((match for pattern in _SELECTED if (match := re.search(pattern, report))), None)
    return {
        "selected": int(selected[1]) if selected else None,
        **{outcome.lower(): list(found.values()).count(outcome) for outcome in OUTCOMES},
        "not_passed": sorted(name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")),
        "report": _tail(report, 80),
    }


def _tail(text: str, lines: int = 15) -> list[str]:
    return [line[:300] for line in text.strip().splitlines()[-lines:]]


if __name__ == "__main__":
    sys.exit(run_command(main))

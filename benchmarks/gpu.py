"""`python -m benchmarks.gpu`: everything worth measuring on a machine with NVIDIA GPUs, in one JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from benchmarks import record
from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError
from jaxtron.train.runtime import expects_gpu

Section = Literal["ceilings", "train", "attention_jax", "attention_torch", "tests"]

# the most seconds of each; together they may not outlast GpuBenchmark.minutes
LIMITS: dict[Section, int] = {"ceilings": 90, "train": 300, "attention_jax": 150, "attention_torch": 120, "tests": 240}


class GpuBenchmark(Config):
    """What `python -m benchmarks.gpu` measures."""

    config: str = "configs/gpt_1b.yaml"
    """The run whose train step is measured."""
    sections: tuple[Section, ...] = tuple(LIMITS)
    """Which parts, in this order; each has a process of its own, so that one crash does not lose the rest."""
    minutes: float = Field(9.0, gt=0)
    """All sections end within this; those that did not begin are recorded as skipped."""
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
    for section in config.sections:
        seconds = min(LIMITS[section], deadline - time.monotonic())
        outcome = run_section(command(section, config), seconds)
        result["sections"][section] = outcome
        record.write(path, result)
        print(f"{section}: {outcome['status']} {outcome.get('reason', '')}".strip(), flush=True)
    print(f"written to {path}")
    return int(any(outcome["status"] in ("failed", "timeout") for outcome in result["sections"].values()))


def command(section: Section, config: GpuBenchmark) -> list[str]:
    """What a section runs."""
    module = {
        "ceilings": ["benchmarks.ceilings"],
        "train": ["benchmarks.train", config.config],
        "attention_jax": ["benchmarks.attention"],
        "attention_torch": ["benchmarks.attention_torch"],
        "tests": ["pytest", "-q", "-m", "gpu", "tests"],
    }[section]
    return [sys.executable, "-m", *module]


def run_section(words: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs a command for at most `seconds`; its JSON as `result`, or a status that says what is missing and why."""
    if seconds < 1:
        return {"status": "skipped", "reason": "no time was left"}
    start = time.monotonic()
    environment = os.environ | {"JAXTRON_TEST_PLATFORM": "cuda"}
    process = subprocess.Popen(
        words,
        cwd=record.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # the session that it leads: also what it started itself
        os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate()
        return {"status": "timeout", "reason": f"ended after {seconds:.0f} s", "stderr": _tail(stderr)}
    outcome = _read(words, process.returncode, stdout, stderr)
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def _read(words: Sequence[str], code: int, stdout: str, stderr: str) -> dict[str, Any]:
    if "pytest" in words:
        if code == 5:
            return {"status": "absent", "reason": "there are no tests marked gpu"}
        return {"status": "failed" if code else "ok", "result": {"report": _tail(stdout)}}
    if code:
        return {"status": "failed", "reason": f"exit code {code}", "stderr": _tail(stderr)}
    try:
        result, _ = json.JSONDecoder().raw_decode(stdout[max(stdout.find("{"), 0) :])
    except ValueError:
        return {"status": "failed", "reason": "it printed no JSON", "stderr": _tail(stderr)}
    if "absent" in result:
        return {"status": "absent", "reason": result["absent"]}
    return {"status": "ok", "result": result}


def _tail(text: str, lines: int = 15) -> list[str]:
    return [line[:300] for line in text.strip().splitlines()[-lines:]]


if __name__ == "__main__":
    sys.exit(run_command(main))

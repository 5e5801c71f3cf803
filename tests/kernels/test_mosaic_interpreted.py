"""Mosaic attention in Pallas' interpreter: numbers against plain float32, and races."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.support.compiling import QUICK

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter before JAX 0.11 lacks layouts and transposed operands"
)
PROGRAM = Path(__file__).with_name("interpreted.py")
FAST = ["one", "everything", "everything, backward", "dropout, deterministic"]
NAMES = [
    "causal",
    "everything",
    "everything in two rows",
    "full",
    "window",
    "window around",
    "keys later",
    "keys all later",
    "soft cap",
    "slopes",
    "negative scale",
    "segments",
    "dropout",
    "whole tiles",
    "one",
    "float16",
    "96",
    "128",
    "192",
    "256",
    "40 and 24",
]
# weights and outputs are rounded to 8 bits (bfloat16), whose relative error is at most 2^-9 each time; a gradient
# passes four such roundings, whose errors mostly cancel in sums
MOST_ERROR = 0.012
# float32 throughout, of scores up to 10
MOST_LSE_ERROR = 1e-4


def interpret(names: list[str], seconds: int, program: Path = PROGRAM) -> list[dict]:
    """What a program's cases report; fails if the interpreter hangs, as it does on a barrier that nobody arrives at."""
    reports = run(program, names, seconds)
    assert [report["case"] for report in reports] == names
    return reports


def run(program: Path, arguments: list[str], seconds: int) -> list[dict]:
    """The lines of JSON that a program of this folder prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    environment["PYTHONPATH"] = str(PROGRAM.parents[2])
    done = subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=seconds, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(reports: list[dict]) -> None:
    for report in reports:
        assert not any(report["races"]), report
        for name, error in report["errors"].items():
            assert error <= (MOST_LSE_ERROR if name == "lse" else MOST_ERROR), report


def test_short_sequences_are_right_and_free_of_races() -> None:
    check(interpret(FAST, seconds=240))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", ", backward", ", deterministic"], ids=["forward", "backward", "deterministic"])
def test_every_feature_is_right_and_free_of_races(kind: str) -> None:
    check(interpret([name + kind for name in NAMES], seconds=900))

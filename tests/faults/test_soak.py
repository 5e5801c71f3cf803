"""A sample of the kills of `make soak`, and what its log says of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.soak import EVERY, _lost, _phase, summary

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_runs_that_are_killed_end_as_undisturbed_ones(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "tests.faults", "soak", "--kills", "8", "--each", "4", "--log", str(log)]
    # the suite's own settings of XLA are not for what it starts
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kills = [line for line in lines if "phase" in line]
    assert len(kills) == 8 and all(line["wrong"] == [] for line in lines)
    assert {len(line["codes"]) for line in kills} == {1, 2}
    assert all(-9 in line["codes"] for line in kills) and len({line["phase"] for line in kills}) > 1


def test_a_save_that_was_told_of_is_not_lost(tmp_path: Path):
    events = [{"step": step, "event": "checkpoint"} for step in (EVERY, 2 * EVERY, 3 * EVERY)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"st')
    assert _lost(tmp_path, 2 * EVERY) == []
    assert _lost(tmp_path, EVERY) == [f"saves up to step {3 * EVERY} were told, and step {EVERY} is the newest"]


def test_phases(tmp_path: Path):
    assert _phase(tmp_path, 0.0) == "before the first step"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert _phase(tmp_path, 0.0) == "between saves"
    (tmp_path / "checkpoints" / "step_00000002.deleting").mkdir(parents=True)
    assert _phase(tmp_path, 0.0) == "inside a deletion"
    (tmp_path / "checkpoints" / "step_00000004.orbax-checkpoint-tmp").mkdir()
    assert _phase(tmp_path, 0.0) == "inside a save" and _phase(tmp_path, 1e12) == "before the first step"


def test_what_is_wrong_is_in_the_summary():
    kill = {
        "run": 3,
        "layout": "2 x 1",
        "phase": "inside a save",
        "logged": 5,
        "saved": 4,
        "noticed": 1.5,
        "codes": [75, -9],
    }
    text = summary([{**kill, "wrong": []}, {"run": 3, "kills": 1, "wrong": ["weights are others"], "ended": True}])
    assert "1 kills in 1 runs; 1 wrong" in text and "run 3: weights are others" in text and "1.5 s (median)" in text

"""Runs with copies in memory and on a local disk: what a failure leaves is gone on from, and an end leaves nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxtron.run.session import RunSession
from tests.support.command_runs import records, run_here, small

STEPS = 8


def flags(folder: Path, run: str = "run") -> list[str]:
    memory = ("--checkpoint.memory_every", "2", "--checkpoint.memory_directory", str(folder / "memory"))
    return [*small(folder, run=run), "--train.steps", str(STEPS), "--train.sample_tokens", "0", *memory]


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.part_*"))


def test_a_run_that_fails_goes_on_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = RunSession.step

    def failing(self: RunSession, state, batch):
        if int(state.step) == 5:
            raise OSError("the machine")
        return original(self, state, batch)

    with monkeypatch.context() as patched:
        patched.setattr(RunSession, "step", failing)
        with pytest.raises(OSError, match="the machine"):
            run_here(*flags(tmp_path))
    assert parts(tmp_path) == ["step_00000002.part_00000", "step_00000004.part_00000"]
    ended = run_here(*flags(tmp_path))
    assert ended.code == 0 and ended.err == ""
    assert "copy of step 4 in the hosts' memory found: continuing\n" in ended.out
    assert [(line["event"], line["step"]) for line in events(tmp_path)] == [
        *(("restored", 4), ("checkpoint", 8), ("complete", 8)),
    ]
    # what is in a checkpoint needs no copy
    assert not parts(tmp_path)
    assert run_here(*flags(tmp_path, "whole")).code == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")

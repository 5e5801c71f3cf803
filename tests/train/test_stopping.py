"""Runs that stop because their time is over, or because a file asks for it: with a checkpoint, and they go on."""

import threading
import time
from pathlib import Path

import pytest

from jaxtron.train import loop
from tests.support.command_runs import records, run_here, small
from tests.support.commands import Ended

COMMON = ("--train.sample_tokens", "0", "--optimizer.schedule", "constant")


def train(folder: Path, *more: str) -> Ended:
    return run_here(*small(folder), *COMMON, *more)


def test_time_that_is_over_and_a_file_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0.0)
    run, file = tmp_path / "run", tmp_path / "run" / "stop"
    ended = train(tmp_path, "--train.steps", "9", "--run.max_minutes", "0.001")
    assert ended.code == 130 and ended.err == ""
    assert (
        "stopped after step 1, for run.max_minutes are over; the same command continues from its checkpoint"
        in ended.out
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]

    def make_the_file() -> None:
        while len(records(run)) < 3:
            time.sleep(0.001)
        file.touch()

    thread = threading.Thread(target=make_the_file)
    thread.start()
    ended = train(tmp_path, "--train.steps", "100000")
    thread.join()
    step = len(records(run))
    assert ended.code == 130 and f"stopped after step {step}, for {file} is there; the same" in ended.out
    assert (run / "checkpoints" / f"step_{step:08d}").exists()

    # it stays, and nobody goes on
    again = train(tmp_path, "--train.steps", str(step + 1))
    assert (again.code, again.err) == (2, f"error: {file} asks the run to stop: remove it to go on\n")
    file.unlink()
    # at the last step there is nothing to stop
    assert train(tmp_path, "--train.steps", str(step + 1), "--run.max_minutes", "0.001").code == 0
    # how long a command may take is no change of the run
    assert "max_minutes" not in (run / "history.jsonl").read_text()

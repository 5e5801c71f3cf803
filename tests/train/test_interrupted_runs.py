"""Ctrl-C and SIGTERM at a sweep of moments of a real run, from its imports to its last line."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.command_runs import Ended, contents, end, records, small, start

NOTICE = "stopping after this step; once more to stop at once\n"
STEPS = 20
ENDLESS = 100_000


def flags(folder: Path, steps: int) -> list[str]:
    return [
        *small(folder),
        "--train.steps",
        str(steps),
        "--train.sample_tokens",
        "20",
        "--train.validation_batches",
        "1",
    ]


def interrupted(folder: Path, moment: float, number: signal.Signals) -> Ended | None:
    """A run that hears of the signal this long after it began to listen; None if it ended before."""
    process = start(*flags(folder, STEPS), cache=folder)
    while len(os.listdir(f"/proc/{process.pid}/task")) == 1:
        time.sleep(0.001)
    time.sleep(moment)
    before = process.poll()
    if before is None:
        process.send_signal(number)
    ended = end(process)
    # an earlier run may have been ended in the middle of a checkpoint, which this one says
    said = [line for line in ended.err.splitlines(keepends=True) if "is not used: unfinished" not in line]
    ended = Ended(ended.code, ended.out, "".join(said))
    return ended if before is None and ended.code else None


@pytest.mark.slow
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, {130}), (signal.SIGTERM, {130, 143})])
def test_any_moment_of_a_run(number: signal.Signals, codes: set[int], tmp_path: Path):
    moment, errors = 0.05, set()
    # compiled programs are kept, so that most moments are of other things
    assert end(start(*flags(tmp_path, STEPS), "--run.directory", str(tmp_path / "first"), cache=tmp_path)).code == 0
    while (ended := interrupted(tmp_path, moment, number)) is not None:
        assert ended.code in codes, (moment, ended)
        stopped = "stopped after step" in ended.out
        assert ended.err in ({NOTICE, ""} if stopped else {"interrupted\n", "terminated\n"}), (moment, ended)
        assert ended.code == 130 or not stopped
        errors.add(ended.err)
        moment += 0.25
    assert moment > 1 and errors & {"interrupted\n", "terminated\n"}
    # and what they left is no obstacle
    again = end(start(*flags(tmp_path, STEPS), cache=tmp_path))
    assert again.code == 0, again
    assert records(tmp_path / "run") == records(tmp_path / "first")


def test_while_jax_starts(tmp_path: Path):
    process = start(*flags(tmp_path, STEPS), cache=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "starting JAX\n"
    process.send_signal(signal.SIGINT)
    ended = end(process)
    assert (ended.code, ended.err) == (130, "interrupted\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_in_the_loop_once_and_twice(tmp_path: Path):
    for times in (1, 2):
        process = start(*flags(tmp_path, ENDLESS), cache=tmp_path)
        log = tmp_path / "run" / "metrics.jsonl"
        lines = log.read_text().count("\n") if log.exists() else 0
        while not log.exists() or log.read_text().count("\n") < lines + 3:
            assert process.poll() is None, end(process)
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        if times == 2:
            assert process.stderr is not None and process.stderr.readline() == NOTICE
            process.send_signal(signal.SIGINT)
        ended = end(process)
        assert ended.code == 130
        if times == 1:
            assert ended.err == NOTICE and "the same command continues from its checkpoint" in ended.out
            assert [name for name in contents(tmp_path / "run") if name.startswith("checkpoints/")]
        else:
            assert ended.err in {"interrupted\n", ""}, ended

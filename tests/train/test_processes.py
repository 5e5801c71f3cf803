"""Two processes over loopback train, stop and resume as one process with all the devices does."""

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.command_runs import Ended, end, free_port, records, run_here, small, start

ENDLESS = 100_000


def start_two(*flags: str, cache: Path, each: Sequence[Sequence[str]] = ((), ())) -> list[subprocess.Popen[str]]:
    """Two processes with four simulated devices each; `each` has flags of one alone."""
    address = f"127.0.0.1:{free_port()}"
    common = ["--devices", "4", "--runtime.coordinator_address", address, "--runtime.num_processes", "2"]
    return [
        start(*flags, *common, *each[number], "--runtime.process_id", str(number), cache=cache) for number in range(2)
    ]


def is_silent(ended: Ended) -> bool:
    """Whether nothing was printed but gloo's own lines, which its threads write into each other."""
    return ended.err == "" and not re.search("step|loss|checkpoint|parameters|error", ended.out)


def stop_at(step: int, path: Path, process: subprocess.Popen[str]) -> None:
    """SIGTERM one process of a run when that step is logged."""
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, end(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        # a run that ended at a step validated there, whatever its interval
        names = one.keys() & other.keys()
        assert len(names) >= 4
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-5)


# the learning rate does not depend on the number of steps, so that runs of different lengths compare
COMMON = ("--optimizer.schedule", "constant", "--train.validate_every", "2", "--train.sample_tokens", "0")


@pytest.mark.parametrize(
    "mesh",
    [
        "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2",
        pytest.param("--mesh.data 4 --mesh.tensor 2 --sharding.zero parameters", marks=pytest.mark.slow),
        pytest.param("--mesh.fsdp 8", marks=pytest.mark.slow),
        # both processes have all rows, and each its part of every sequence
        pytest.param(
            "--mesh.data 1 --mesh.context 2 --mesh.fsdp 4 --mesh.order pipe data context fsdp tensor",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_train_and_resume_as_one(mesh: str, tmp_path: Path):
    flags = [*small(tmp_path), *COMMON, *mesh.split()]
    metrics = tmp_path / "run" / "metrics.jsonl"

    processes = start_two(*flags, "--train.steps", str(ENDLESS), cache=tmp_path)
    # process 1 hears of it, both stop after the same step
    stop_at(4, metrics, processes[1])
    ended = [end(process) for process in processes]
    assert [one.code for one in ended] == [130, 130], ended
    step = records(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {step}; the same command continues" in ended[0].out

    # one process continues what two saved
    alone = run_here(*flags, "--train.steps", str(step + 2))
    assert alone.code == 0 and f"checkpoint of step {step} found: continuing" in alone.out

    # and two what one saved
    longer = ["--train.steps", str(step + 4)]
    processes = start_two(*flags, *longer, "--train.sample_tokens", "3", cache=tmp_path)
    ended = [end(process) for process in processes]
    assert [one.code for one in ended] == [0, 0] and ended[0].err == "", ended
    assert f"checkpoint of step {step + 2} found: continuing" in ended[0].out and is_silent(ended[1])
    assert f"steps            {step + 4} of {step + 4}" in ended[0].out

    assert run_here(*flags, *longer, "--run.directory", str(tmp_path / "undisturbed")).code == 0
    assert_close(records(tmp_path / "run"), records(tmp_path / "undisturbed"))

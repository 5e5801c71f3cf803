"""Runs with copies in memory and on a local disk: what a failure leaves is gone on from, and an end leaves nothing."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from jaxtron.run.session import RunSession
from tests.support.command_runs import end, records, run_here, small
from tests.train.test_processes import assert_close, start_two

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


@pytest.mark.slow
def test_a_process_that_is_killed_has_its_part_with_its_peer(tmp_path: Path):
    lengths = ("--train.steps", "30", "--checkpoint.memory_every", "1", "--checkpoint.every", "0")
    common = [*small(tmp_path), "--train.sample_tokens", "0", "--optimizer.schedule", "constant", *lengths]
    # of a process that is killed the others hear at once, one on a busy machine has its time
    common += ["--runtime.heartbeat_seconds", "120"]
    hosts = [tmp_path / "host0", tmp_path / "host1"]

    def command(place: Path) -> tuple[str, ...]:
        return ("--checkpoint.memory_directory", str(place))

    processes = start_two(*common, cache=tmp_path, each=[command(host) for host in hosts])
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 6:
        assert processes[0].poll() is None, end(processes[0])
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    first, killed = (end(process) for process in processes)
    assert first.code == 75 and killed.code == -signal.SIGKILL, (first, killed)
    # not the process alone: its host is another one, which has nothing
    shutil.rmtree(hosts[1])
    assert {name.rpartition("_")[2] for name in parts(hosts[0])} == {"00000", "00001"}
    processes = start_two(*common, cache=tmp_path, each=[command(host) for host in hosts])
    ended = [end(process) for process in processes]
    assert [one.code for one in ended] == [0, 0], ended
    assert "in the hosts' memory found: continuing" in ended[0].out
    (restored,) = [line for line in events(tmp_path) if line["event"] == "restored"]
    # three copies are there, of which the last may have been half written
    logged = metrics.read_text().count("\n")
    assert restored["step"] >= 4 and logged == 30
    assert not parts(tmp_path)
    # one process with all the devices does the same
    alone = ("--run.directory", str(tmp_path / "whole"), "--checkpoint.memory_directory", str(tmp_path / "memory"))
    assert run_here(*common, *alone).code == 0
    assert_close(records(tmp_path / "run"), records(tmp_path / "whole"))


@pytest.mark.slow
def test_a_copy_costs_little(tmp_path: Path):
    sizes = ("--model.num_layers", "4", "--model.hidden_size", "128", "--data.sequence_length", "128")
    more = ("--train.global_batch", "32", "--train.steps", "60", "--checkpoint.memory_every", "10", "--mesh.data", "1")
    ended = run_here(*flags(tmp_path), *sizes, *more, "--mesh.fsdp", "8")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if line.startswith("copies ")]
    # the part of the time that the loop waited for them
    assert float(line.partition("(")[2].partition("%")[0]) < 2, line

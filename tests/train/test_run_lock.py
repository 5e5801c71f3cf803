"""One command at a time trains in a directory."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.train.run_lock import run_lock
from tests.support.command_runs import FinishedRun, contents, end, free_port, records, run_here, small, start

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_command_is_refused_and_the_first_leaves_nothing(tmp_path: Path):
    directory = tmp_path / "deep" / "run"
    with run_lock(directory):
        with pytest.raises(UserError) as caught, run_lock(directory):
            pass
        # its failure takes nothing from the first
        with pytest.raises(UserError, match="is being trained by another command"), run_lock(directory):
            pass
    assert str(caught.value).startswith(f"{directory} is being trained by another command (process {os.getpid()} on ")
    assert str(caught.value).endswith("; wait for it, stop it, or choose another --run.directory")
    assert list(directory.iterdir()) == []
    with run_lock(directory):
        assert [path.name for path in directory.iterdir()] == ["lock"]


def test_a_killed_process_has_no_lock(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being trained by another command; wait for it"), run_lock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run_lock(tmp_path):
            pass


def test_a_lock_whose_owner_just_left_is_not_taken_for_the_directory_s(tmp_path: Path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            # between opening and locking the file its last owner removed it
            (tmp_path / "lock").unlink()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with run_lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="is being trained"), run_lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch, caplog):
    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with run_lock(tmp_path):
        assert "cannot be locked (No locks available): start no second run in this directory" in caplog.text


def test_a_lock_left_on_another_host_is_told_of(tmp_path: Path, caplog):
    lock = tmp_path / "lock"
    # of a killed process here nothing need be said
    lock.write_text(f"process 7 on {socket.gethostname()} since 2026-01-02 03:04:05")
    with run_lock(tmp_path):
        assert caplog.text == "" and f"process {os.getpid()} on " in lock.read_text()
    lock.write_text("process 7 on elsewhere since 2026-01-02 03:04:05")
    with run_lock(tmp_path):
        assert (
            "was left by process 7 on elsewhere since 2026-01-02 03:04:05: it was killed, or this file" in caplog.text
        )


def test_a_locked_run_is_left_alone_and_may_be_looked_at(finished: FinishedRun, tmp_path: Path):
    directory = tmp_path / "run"
    shutil.copytree(finished.directory, directory)
    flags = [*finished.flags, "--run.directory", str(directory), "--train.sample_tokens", "0"]
    with run_lock(directory):
        before = contents(directory)
        ended = run_here(*flags, "--train.steps", "9")
        assert ended.code == 2 and ended.err.count("\n") == 1 and "parameters" not in ended.out
        assert f"error: {directory} is being trained by another command (process {os.getpid()} on " in ended.err
        # that takes no step
        ended = run_here(*flags)
        assert ended.code == 0 and "complete already" in ended.out
        assert contents(directory) == before
    assert not (directory / "lock").exists()


@pytest.mark.slow
def test_two_commands_at_once_and_then_two_processes_beside_them(tmp_path: Path):
    flags = [*small(tmp_path), "--train.sample_tokens", "0", "--train.steps", "100000", "--checkpoint.every", "5"]
    first = start(*flags, "--devices", "1", cache=tmp_path)
    while not list(tmp_path.glob("run/checkpoints/step_0000001?")):
        assert first.poll() is None, end(first)
    second = end(start(*flags, "--devices", "1", cache=tmp_path))
    assert second.code == 2 and second.err.count("\n") == 1
    assert f"run is being trained by another command (process {first.pid} on " in second.err
    shared = ["--runtime.coordinator_address", f"127.0.0.1:{free_port()}", "--runtime.num_processes", "2"]
    both = [start(*flags, *shared, "--devices", "1", "--runtime.process_id", str(n), cache=tmp_path) for n in (0, 1)]
    for process in map(end, both):
        assert process.code == 2 and f"by another command (process {first.pid} on " in process.err
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    stopped = end(first)
    assert stopped.code == 130 and stopped.err == ""
    steps = [line["step"] for line in records(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and not list(tmp_path.glob("run/**/*damaged*"))

"""A disk that takes no more: one line, and nothing half-written."""

import errno
import json
import os
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import pytest

from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.run import metrics
from jaxtron.run.metrics import MetricsWriter
from jaxtron.train.hooks import Profiler, StepInfo
from jaxtron.train.trackers import TensorBoardTracker
from tests.support.commands import run_main

FULL = "No space left on device"


def full(*_anything: object) -> None:
    raise OSError(errno.ENOSPC, FULL)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_whole(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"^cannot write {path}: {FULL}; make room$"):
        write_whole(path, "new" * 1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="No such file or directory; write elsewhere$"):
        write_whole(tmp_path / "nowhere" / "a", b"new")


@pytest.mark.parametrize("taken", [0, 10])
def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch, taken: int):
    class Full(FileIO):
        def write(self, data) -> int:
            return super().write(data if b'"step": 1,' in bytes(data) else bytes(data)[:taken])

    monkeypatch.setattr(metrics, "FileIO", Full)
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    assert list(tmp_path.iterdir()) == []
    writer.write(1, {"loss": 2.0})
    with pytest.raises(UserError, match=f"metrics.jsonl: {FULL}; make room and give the same command again"):
        writer.write(2, {"loss": 1.0})
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_whatever_else_is_written_is_one_line_too():
    def main(argv: list[str]) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "some/file")

    ended = run_main(main, [])
    assert (ended.code, ended.err) == (
        2,
        "error: cannot write some/file: Disk quota exceeded; make room and run it again\n",
    )

    def defect(argv: list[str]) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor", "some/file")

    with pytest.raises(OSError, match="Bad file descriptor"):
        run_main(defect, [])


def test_an_output_that_is_full():
    with open("/dev/full", "w") as disk:
        ended = subprocess.run(
            [sys.executable, "-m", "jaxtron.train", "--help"], stdout=disk, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (
        2,
        f"error: cannot write the output: {FULL}; make room and run it again\n",
    )


def test_a_trace_that_does_not_fit(tmp_path: Path, monkeypatch):
    def start(folder: str) -> None:
        (Path(folder) / "plugins").mkdir(parents=True)
        (Path(folder) / "plugins" / "new.xplane.pb").write_bytes(b"")

    def stop() -> None:
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {tmp_path}/plugins/new.xplane.pb; {FULL}")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    profiler = Profiler(tmp_path / "profile", (2, 3))
    profiler.after(StepInfo(1, 9, state=None))
    with pytest.raises(UserError, match=f"the trace of run.profile_steps cannot be written to .*profile: {FULL}"):
        profiler.after(StepInfo(3, 9, state=None))
    profiler.close()
    assert not list(tmp_path.rglob("*.pb"))


def test_tensorboard_s_thread_fails_in_one_line_and_does_not_stop_the_run_for_ever(tmp_path: Path, capsys):
    logged: list[str] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int | None):
            self.worker = threading.Thread(target=full)
            self.file_writer = SimpleNamespace(event_writer=SimpleNamespace(_worker=self.worker))

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            logged.append(name)
            self.worker.start()
            self.worker.join()

        def close(self) -> None:
            raise AssertionError("it would wait for the thread")

    hook = threading.excepthook
    tensorboard = ModuleType("tensorboardX")
    tensorboard.SummaryWriter = SummaryWriter
    tracker = TensorBoardTracker(tensorboard, tmp_path, resume_step=0)
    with pytest.raises(UserError, match=f"cannot write TensorBoard's events to {tmp_path}: {FULL}; make room"):
        tracker.log(1, {"loss": 1.0, "mfu": 0.5})
    tracker.close()
    assert logged == ["loss"] and threading.excepthook is hook and capsys.readouterr().err == ""

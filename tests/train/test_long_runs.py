"""What a run takes stays what it is, and is given back whatever the end: memory, threads, files, processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.train.__main__ import main
from jaxtron.train.hooks import RunHook, RunStart, StepInfo
from jaxtron.train.loop import LOOK_SECONDS
from tests.support.command_runs import own_programs, small
from tests.support.commands import Ended, run_main

STEPS, WARM = 10_000, 2_000


def fail(_: Path) -> None:
    raise UserError("enough")


def ask_by_file(directory: Path) -> None:
    (directory / "stop").touch()
    # a run of five quick steps would be over before it looks again
    time.sleep(LOOK_SECONDS)


ENDS: dict[str, tuple[Callable[[Path], object], int]] = {
    "complete": (lambda _: None, 0),
    "a file": (ask_by_file, 130),
    "SIGTERM": (lambda _: os.kill(os.getpid(), signal.SIGTERM), 130),
    "an error": (fail, 2),
}


class AtTheThird(RunHook):
    """Does something after the third step."""

    def __init__(self, act: Callable[[Path], object]) -> None:
        self._act = act

    def start(self, run: RunStart) -> None:
        """Remember where."""
        self._directory = run.directory

    def after(self, info: StepInfo) -> None:
        """Do it."""
        if info.step == 3:
            self._act(self._directory)


def end_by(folder: Path, act: Callable[[Path], object], name: str) -> Ended:
    flags = [*small(folder, run=name), "--train.steps", "5", "--train.sample_tokens", "0", "--checkpoint.every", "2"]
    flags += ["--checkpoint.memory_every", "1", "--checkpoint.memory_directory", str(folder / "memory")]
    with own_programs():
        return run_main(lambda words: main(words, [AtTheThird(act)]), flags)


def held() -> tuple[list[str], list[str], str]:
    """Threads of Python, open files and child processes."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            # the folder that was listed
            continue
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return sorted(thread.name for thread in threading.enumerate()), sorted(files), children


def test_nothing_is_left_whatever_the_end(tmp_path: Path):
    # what is made once for all runs of a process
    assert end_by(tmp_path, lambda _: None, "first").code == 0
    before = held()
    for number, (name, (act, code)) in enumerate(ENDS.items()):
        ended = end_by(tmp_path, act, f"run{number}")
        assert ended.code == code, (name, ended)
        assert held() == before, name


@pytest.mark.slow
def test_memory_stays_what_it_is(tmp_path: Path):
    sizes = ("--model.num_layers", "1", "--model.hidden_size", "8", "--model.num_heads", "1")
    flags = [*small(tmp_path), *sizes, "--data.sequence_length", "8", "--train.global_batch", "2", "--devices", "1"]
    flags += ["--train.steps", str(STEPS), "--run.log_every", "50", "--train.validate_every", "1000"]
    flags += ["--train.sample_tokens", "0", "--checkpoint.every", "1000", "--checkpoint.memory_every", "100"]
    flags += ["--checkpoint.memory_directory", str(tmp_path / "memory")]
    script = [sys.executable, str(Path(__file__).with_name("long_run.py")), *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=3000)
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["code"] == 0, ended
    warm = [size for step, size in told["memory"] if WARM < step <= WARM + 1000]
    late = [size for step, size in told["memory"] if step > STEPS - 1000]
    assert max(late) < 1.01 * max(warm), (max(warm), max(late))

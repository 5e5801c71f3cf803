"""Two processes in collectives, one of which goes: the other ends with one line that names it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command_runs import free_port
from tests.support.compiling import QUICK

PROGRAM = """
import sys, time
from pathlib import Path
from jaxtron import interrupts
from jaxtron.command import run_command
from jaxtron.config import UserError, load
from jaxtron.quiet import import_jax
import_jax()
from jaxtron.runtime.start import start_runtime
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.together import leaving_together

def main(argv):
    folder, *flags = argv
    start_runtime(load(RuntimeConfig, None, flags), devices=2)
    import jax
    from jax.sharding import PartitionSpec as P

    mine = Path(folder) / str(jax.process_index())
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    total = jax.jit(jax.shard_map(lambda: jax.lax.psum(1, "all"), mesh=mesh, in_specs=(), out_specs=P()))
    with leaving_together():
        while not Path(folder, "done").exists() or int(total()) != 4:
            assert int(total()) == 4
            mine.with_suffix(".ready").touch()
            if mine.with_suffix(".error").exists():
                raise UserError("the disk is full")
            if mine.with_suffix(".defect").exists():
                raise AssertionError("a defect")
    if jax.process_index() == 1:
        time.sleep(1)
    return 0

interrupts.watch()
sys.exit(run_command(main))
"""
SECONDS = 10


def start(folder: Path) -> list[subprocess.Popen[str]]:
    """Both, in the middle of collectives."""
    address = f"127.0.0.1:{free_port()}"
    flags = ["--coordinator_address", address, "--num_processes", "2", "--heartbeat_seconds", str(SECONDS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), *flags, "--process_id", str(number)],
            env=os.environ | {"XLA_FLAGS": QUICK},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    while not all((folder / f"{number}.ready").exists() for number in range(2)):
        assert all(process.poll() is None for process in processes), [end(process) for process in processes]
        time.sleep(0.01)
    return processes


def end(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """Exit code and standard error; without gloo's own lines, which its threads write into each other."""
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        raise AssertionError(f"it did not end:\n{err}") from None
    return process.returncode, err


ADVICE = "; see its own output; the same command continues from the last checkpoint\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed(victim: int, tmp_path: Path):
    processes = start(tmp_path)
    processes[victim].kill()
    code, err = end(processes[1 - victim], SECONDS)
    assert (code, err) == (75, f"error: process {victim} is gone: it was killed, or its machine failed{ADVICE}")
    end(processes[victim])


def stop(folder: Path, process: subprocess.Popen[str], victim: int) -> None:
    process.send_signal(signal.SIGSTOP)


def fail(folder: Path, process: subprocess.Popen[str], victim: int) -> None:
    (folder / f"{victim}.error").touch()


def break_down(folder: Path, process: subprocess.Popen[str], victim: int) -> None:
    (folder / f"{victim}.defect").touch()


def interrupt(folder: Path, process: subprocess.Popen[str], victim: int) -> None:
    process.send_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("harm", "told", "code", "own"),
    [
        (stop, f"gave no sign of life within runtime.heartbeat_seconds {SECONDS}", None, ""),
        (fail, "ended with an error: the disk is full", 2, "error: the disk is full\n"),
        (break_down, "ended with an error: a defect", 1, r"Traceback[\s\S]*AssertionError: a defect\n"),
        (interrupt, "was interrupted", 130, "interrupted\n"),
    ],
)
def test_one_stops_or_fails(harm: Callable, told: str, code: int | None, own: str, victim: int, tmp_path: Path):
    processes = start(tmp_path)
    harm(tmp_path, processes[victim], victim)
    # what would fail again is told from what need not
    others = 2 if harm in (fail, break_down) else 75
    assert end(processes[1 - victim], SECONDS + 5) == (others, f"error: process {victim} {told}{ADVICE}")
    if code is None:
        # it hears of it when it goes on
        processes[victim].send_signal(signal.SIGCONT)
        assert end(processes[victim])[0] == 75
        return
    found, err = end(processes[victim])
    assert found == code and re.fullmatch(own, err), err


def test_both_end_well(tmp_path: Path):
    processes = start(tmp_path)
    (tmp_path / "done").touch()
    assert [end(process) for process in processes] == [(0, "")] * 2

"""Supervisors over loopback, with real processes: hosts that die and come back, and a process that hangs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.command_runs import free_port, history, records, run_here, small
from tests.support.compiling import QUICK

pytestmark = pytest.mark.slow
PATIENCE = 600
# what a run of any length has in common with others
COMMON = (
    *("--optimizer.schedule", "constant", "--train.sample_tokens", "0", "--train.validate_every", "0"),
    *("--train.global_batch", "24", "--checkpoint.keep", "2"),
)
EVERY_OTHER = ("--checkpoint.every", "2")


class Hosts:
    """Supervisors of one run, each with a log; the first one leads."""

    def __init__(self, folder: Path, nodes: str, *flags: str) -> None:
        if "--checkpoint.every" not in flags:
            flags = (*flags, *EVERY_OTHER)
        self.folder, self.flags = folder, [*small(folder), *COMMON, "--train.steps", "1000000", *flags]
        self.line = ["--nodes", nodes, "--rendezvous", f"127.0.0.1:{free_port()}", "--grow-after", "1"]
        self.supervisors: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / f"log{len(self.supervisors)}").open("wb") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "jaxtron.launch", *self.line, "--", sys.executable, "-m", "jaxtron.train"]
                + ["--devices", "1", *self.flags],
                env=os.environ | {"XDG_CACHE_HOME": str(self.folder), "XLA_FLAGS": QUICK},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.supervisors.append(supervisor)
        return supervisor

    def log(self, number: int = 0) -> str:
        return (self.folder / f"log{number}").read_text(errors="replace")

    def wait(self, what: Callable[[], object], seconds: float = PATIENCE) -> float:
        """Until something is so; the seconds that took."""
        begun = time.monotonic()
        while not what():
            logs = "\n".join(f"log {number}:\n{self.log(number)}" for number in range(len(self.supervisors)))
            assert time.monotonic() - begun < seconds and self.supervisors[0].poll() is None, logs
            time.sleep(0.05)
        return time.monotonic() - begun

    def wait_for_round(self, number: int, hosts: int) -> float:
        return self.wait(lambda: re.search(rf"round {number}: {hosts} hosts?", self.log()))

    def wait_for_commands(self, count: int) -> None:
        """Until so many commands have done a step."""
        self.wait(lambda: (self.folder / "run" / "history.jsonl").exists() and len(self.history()) >= count)

    def wait_for_steps(self, more: int) -> None:
        """Until so many more are logged, and one of them saved."""
        last = self.last_step()
        self.wait(lambda: self.last_step() >= last + more)

    def history(self) -> list[dict]:
        return history(self.folder / "run")

    def last_step(self) -> int:
        is_logged = (self.folder / "run" / "metrics.jsonl").exists()
        return max((line["step"] for line in records(self.folder / "run")), default=0) if is_logged else 0

    def end(self) -> list[int]:
        """Asks the first to stop; the exit codes of those that live."""
        self.supervisors[0].send_signal(signal.SIGTERM)
        alive = [supervisor for supervisor in self.supervisors if supervisor.poll() is None]
        return [supervisor.wait(PATIENCE) for supervisor in alive]


@contextmanager
def hosts_of(folder: Path, nodes: str, *flags: str, count: int) -> Iterator[Hosts]:
    made = Hosts(folder, nodes, *flags)
    try:
        made.start()
        # the one that has the port is the first
        made.wait(lambda: "coordination" in commands_of(made.supervisors[0].pid))
        for _ in range(count - 1):
            made.start()
        yield made
    finally:
        for supervisor in made.supervisors:
            # and with it all that it started
            supervisor.kill()
            supervisor.wait()


def commands_of(pid: int) -> str:
    """The command lines of a process's children."""
    return "\n".join(Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ") for child in children_of(pid))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def training_of(pid: int) -> int:
    """The process of a supervisor that trains."""
    (found,) = [
        child for child in children_of(pid) if b"jaxtron.train\0" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return found


def test_a_host_dies_and_comes_back(tmp_path: Path):
    with hosts_of(tmp_path, "3:4", count=4) as hosts:
        hosts.wait_for_round(1, 4)
        hosts.wait_for_commands(1)
        hosts.wait_for_steps(3)
        victim = hosts.supervisors[2]
        orphan = training_of(victim.pid)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        noticed = hosts.wait(lambda: "round 1 is over" in hosts.log())
        # nothing of the host is left
        assert noticed < 30 and not Path(f"/proc/{orphan}").exists(), noticed
        hosts.wait_for_round(2, 3)
        hosts.wait_for_commands(2)
        hosts.wait_for_steps(3)
        hosts.start()
        hosts.wait_for_round(3, 4)
        hosts.wait_for_commands(3)
        hosts.wait_for_steps(3)
        assert hosts.end() == [130] * 4
        begun = [line["step"] for line in hosts.history()]
        assert [line["devices"]["processes"] for line in hosts.history()] == [4, 3, 4]
        assert [line["changes"].get("train.microbatches") for line in hosts.history()] == [None, [1, 2], [2, 1]]
        # the third began where the second was asked to save
        assert 0 == begun[0] < begun[1] < begun[2] and "stopped after step" in hosts.log()
    ours = records(tmp_path / "run")
    steps = begun[2] + 3
    # eight devices of one process, which nobody disturbs
    flags = [*small(tmp_path, run="undisturbed"), *COMMON, *EVERY_OTHER, "--train.steps", str(steps)]
    assert run_here(*flags).code == 0
    theirs = records(tmp_path / "undisturbed")
    assert [line["step"] for line in ours[:steps]] == list(range(1, steps + 1))
    for one, other in zip(ours[:steps], theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), one["step"]


def test_a_process_that_is_stopped_is_ended_by_the_watchdog(tmp_path: Path):
    flags = ("--runtime.heartbeat_seconds", "300", "--train.watchdog.floor_seconds", "20")
    # what waits for a save that does not end is no step, and not the watchdog's: it is stopped between two
    flags += ("--checkpoint.every", "20")
    with hosts_of(tmp_path, "2", *flags, count=2) as hosts:
        hosts.wait_for_round(1, 2)
        hosts.wait_for_commands(1)
        hosts.wait_for_steps(23)
        stopped = training_of(hosts.supervisors[1].pid)
        os.kill(stopped, signal.SIGSTOP)
        hosts.wait_for_round(2, 2)
        assert not Path(f"/proc/{stopped}").exists()
        hosts.wait_for_commands(2)
        hosts.wait_for_steps(2)
        assert hosts.end() == [130] * 2
        log = hosts.log()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (hang,) = [event for event in events if event["event"] == "hang"]
    assert "no step came for" in hang["why"] and hang["silent"] == [1], hang
    assert len(hang["processes"]) == 1 and hang["processes"][0].startswith("process 0 on ")
    assert "did not end within 15 s of the others (exit code 75)" in log and "no answer from process 1" in log
    text = (tmp_path / "run" / "stacks" / "process_0.txt").read_text()
    assert "most recent call first" in text and "loop.py" in text

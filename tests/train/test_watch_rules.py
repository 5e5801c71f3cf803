"""When a step is overdue and who is slow: rules on a clock of the test's own; and one process that hangs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.run.run_config import WatchdogConfig
from jaxtron.train.throughput import Throughput
from jaxtron.train.watch import stacks
from jaxtron.train.watch.rules import FIRST_FLOORS, LATE_SECONDS, StepRule, slow_hosts


class Clocked:
    """A rule, its clock, and the steps that are done."""

    def __init__(self, factor: float = 10, floor: float = 60) -> None:
        self.now, self.done, self.step = 0.0, 0, 0
        self.rule = StepRule(WatchdogConfig(factor=factor, floor_seconds=floor), 0, self.now)

    def dispatch(self) -> None:
        self.step += 1
        step = self.step
        self.rule.dispatch(step, lambda: self.done >= step)

    def wait(self, seconds: float) -> str | None:
        """Looks every second; who is overdue, `done/dispatched after seconds of limit`, the first time."""
        for _ in range(round(seconds)):
            self.now += 1
            if found := self.rule.look(self.now):
                return f"{found.done}/{found.dispatched} after {found.seconds:g} of {found.limit:g}"
        return None

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.dispatch()
            assert self.wait(seconds) is None
            self.done = self.step
        self.wait(1)


def test_a_step_is_overdue_after_so_many_medians():
    clocked = Clocked()
    clocked.steps(5, 20)
    # three are given to the devices at once, and none comes back
    for _ in range(3):
        clocked.dispatch()
    assert clocked.rule.limit == pytest.approx(200, rel=0.1)
    assert clocked.wait(180) is None
    assert (clocked.wait(40) or "").startswith("5/8 after 2")


def test_short_steps_have_the_floor_and_the_first_six_of_them():
    clocked = Clocked()
    clocked.dispatch()
    assert clocked.wait(60 * FIRST_FLOORS) is None and (clocked.wait(2) or "").startswith("0/1 after 361 of 360")
    quick = Clocked()
    quick.steps(300, 1)
    assert quick.wait(55) is None and (quick.wait(10) or "").startswith("300/300 after 61 of 60")


def test_what_is_paused_never_counts():
    clocked = Clocked()
    clocked.steps(5, 20)
    clocked.dispatch()
    clocked.rule.pause()
    # a save inside of a validation, or the other way round
    clocked.rule.pause()
    assert clocked.wait(5000) is None
    clocked.rule.go_on(clocked.now)
    assert clocked.wait(5000) is None
    clocked.rule.go_on(clocked.now)
    assert clocked.wait(190) is None and clocked.wait(30) is not None


def test_a_machine_that_slept_is_no_hang_and_its_sleep_no_step():
    clocked = Clocked()
    clocked.steps(5, 20)
    limit = clocked.rule.limit
    clocked.dispatch()
    clocked.now += 36_000
    assert clocked.rule.look(clocked.now) is None and clocked.wait(limit - 5) is None
    clocked.done = clocked.step
    assert clocked.wait(1) is None
    clocked.dispatch()
    clocked.now += LATE_SECONDS + 1
    clocked.done = clocked.step
    assert clocked.wait(1) is None and clocked.rule.limit < 2 * limit


def times(*rows: tuple[float, float, float]) -> list[dict[str, float]]:
    return [dict(zip(("input", "dispatch", "step"), row, strict=True)) for row in rows]


def test_who_is_slow_and_in_what():
    usual = (0.01, 0.02, 1.0)
    assert slow_hosts(times(usual, usual, usual)) == {}
    assert slow_hosts(times(usual, (0.4, 0.02, 1.0), usual)) == {1: ["input"]}
    assert slow_hosts(times(usual, usual, (0.4, 0.5, 1.3))) == {2: ["input", "dispatch", "step"]}
    # 1.2 times, but of next to nothing
    assert slow_hosts(times(usual, (0.05, 0.02, 1.0), usual)) == {}
    # nearly
    assert slow_hosts(times((0.5, 0.02, 1.0), (0.59, 0.02, 1.0), (0.5, 0.02, 1.0))) == {}
    # of two the median is between them
    assert slow_hosts(times(usual, (0.4, 0.02, 1.0))) == {1: ["input"]}


def test_what_is_excluded_from_the_speed_is_excused_elsewhere_too():
    entered: list[str] = []

    @contextlib.contextmanager
    def excused():
        entered.append("in")
        yield
        entered.append("out")

    with Throughput(excused=excused).excluded(()):
        assert entered == ["in"]
    assert entered == ["in", "out"]


def test_where_the_main_thread_is():
    assert stacks.place().startswith("stacks.py:") and "test_where_the_main_thread_is" in stacks.place()
    assert not stacks.is_debugged()
    try:
        sys._getframe().f_trace = lambda *_: None
        assert stacks.is_debugged()
    finally:
        sys._getframe().f_trace = None


def test_a_signal_shows_the_stacks_of_a_process_that_hears_nothing_else():
    program = (
        "import os, threading, time; from jaxtron.train.watch.stacks import show_on_signal; show_on_signal(); "
        "hold = lambda: time.sleep(60); threading.Thread(target=hold, daemon=True).start(); print('up', flush=True); "
        "hold()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR2)
        said = [process.stderr.readline() for _ in range(2)]
        process.kill()
    assert any("most recent call first" in line for line in said), said


HANGS = """
import json, sys, time
from pathlib import Path
from jaxtron import interrupts
interrupts.watch()
from jaxtron.config import load
from jaxtron.run.configuration import Configuration
from jaxtron.train.watch import watcher

def wait_for_a_file_system():
    while True:
        time.sleep(1)

config = load(Configuration, None, ["--train.watchdog.floor_seconds", "0.5", "--train.watchdog.factor", "2"])
watcher.LOOK_SECONDS = 0.05
made = watcher.Watcher(config, Path(sys.argv[1]), 3, lambda *_: None)
with made.watching():
    with made.paused():
        # longer than six floors
        time.sleep(4)
    print("paused", flush=True)
    with made.input():
        wait_for_a_file_system()
"""


def test_a_process_that_hangs_says_where_and_ends_with_try_again(tmp_path: Path):
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert ended.returncode == 75 and ended.stdout == "paused\n", ended
    assert time.monotonic() - begun > 4 + 6 * 0.5
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"]) == ("hang", 3)
    assert "limit 3 s, train.watchdog): step 3 is done, 3 was given" in event["why"]
    (where,) = event["processes"]
    assert where.startswith("process 0 on ") and ", in input: " in where and "wait_for_a_file_system" in where
    for text in (ended.stderr, (tmp_path / "stacks" / "process_0.txt").read_text()):
        # the main thread's, and the watchdog's own
        assert "wait_for_a_file_system" in text and "in _look" in text and "no step came for" in text


def test_the_floor_of_no_watchdog_has_no_effect():
    assert load(WatchdogConfig, None, ["--factor", "none"]).factor is None
    with pytest.raises(ValueError, match=r"train.watchdog.floor_seconds 5.*no effect"):
        load(WatchdogConfig, None, ["--factor", "none", "--floor_seconds", "5"])

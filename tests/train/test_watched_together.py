"""Two watched loops that know of each other over the channel alone: who is slow is named, and a hang ends both."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.command_runs import free_port

# both in one process, on threads; only what JAX says of processes is stood in for
PROGRAM = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from jaxtron import interrupts
interrupts.watch()
from jaxtron.config import load
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.together import Together
from jaxtron.train.hooks import StepInfo
from jaxtron.train.watch import watcher

folder, port = Path(sys.argv[1]), sys.argv[2]
flags = ["--train.watchdog.floor_seconds", "3", "--train.watchdog.factor", "2", "--run.log_every", "2"]
config = load(Configuration, None, flags)
watcher.LOOK_SECONDS = watcher.COLLECT_SECONDS = watcher.LEAST_SECONDS = 0.2
told = []

def make(process):
    together = Together(f"127.0.0.1:{port}", process, 2, heartbeat_seconds=60, connect_seconds=60)
    watcher.channel = lambda: together
    watcher.jax = SimpleNamespace(process_index=lambda: process, process_count=lambda: 2)
    return watcher.Watcher(config, folder, 0, lambda *about: told.append(about))

loops = [make(0), make(1)]
together = loops[1]._channel
# a line before its connection is there has no way to go
while not together._writers or not loops[0]._channel._writers:
    time.sleep(0.01)

def steps(loop, reading, until):
    for number in range(1, until + 1):
        with loop.input():
            time.sleep(reading)
        with loop.dispatch(8):
            time.sleep(0.01)
        loop(StepInfo(number, 100, None, {"loss": SimpleNamespace(is_ready=lambda: True)}))

with loops[0].watching(), loops[1].watching():
    other = threading.Thread(target=steps, args=(loops[1], 0.2, 6))
    other.start()
    steps(loops[0], 0.1, 6)
    other.join()
    # what came after the last look is seen at the next
    time.sleep(0.3)
    loops[0]._name_slow()
    print(*(f"{event} {step} {line} {sorted(about)}" for event, step, line, about in told), sep="\\n", flush=True)
    with loops[0].input():
        time.sleep(60)
"""


def test_slow_ones_are_named_and_a_hang_ends_all(tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(free_port())], capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 75, ended
    lines = ended.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["stragglers", "4"], ["stragglers", "6"]], ended.stdout
    assert all("slower than the others: " in line and line.endswith("['hosts']") for line in lines)
    # a machine that is busy may add others
    assert all(re.search(r"process 1 on \S+ in input .*\(input 0\.[23]", line) for line in lines), ended.stdout

    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"], event["silent"]) == ("hang", 6, [])
    assert [text.split(" on ")[0] for text in event["processes"]] == ["process 0", "process 1"]
    assert ", in input: " in event["processes"][0] and ", in what follows a step: " in event["processes"][1]
    assert all((tmp_path / "stacks" / f"process_{number}.txt").read_text() for number in range(2))
    # each says why, the second as it was asked to
    assert ended.stderr.count("watchdog: no step came for ") == 2, ended.stderr

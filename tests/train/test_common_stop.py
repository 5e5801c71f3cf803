"""Processes that agree on the step after which they stop, whoever is asked and whenever."""

import random
import threading
import time
from collections.abc import Callable

import pytest

from jaxtron.runtime.common_stop import CommonStop


def joined(count: int, delays: random.Random) -> list[CommonStop]:
    """As `together.py` joins them: process 0 writes to all others, they to it, each line after a while, in order."""
    stops: list[CommonStop] = []
    lock = threading.Lock()

    def sender(process: int) -> Callable[[bytes], None]:
        last: list[threading.Thread] = []

        def send(line: bytes) -> None:
            targets = range(1, count) if process == 0 else [0]
            before = last[-1] if last else None

            def deliver() -> None:
                time.sleep(delays.uniform(0, 0.003))
                if before is not None:
                    before.join()
                for target in targets:
                    assert stops[target].hear(process, line)

            thread = threading.Thread(target=deliver)
            with lock:
                last.append(thread)
                thread.start()

        return send

    stops += [CommonStop(process, count, sender(process)) for process in range(count)]
    return stops


def steps_of(stop: CommonStop, delays: random.Random, ask_at: int | None, ends: list[int], process: int) -> None:
    for step in range(1, 1000):
        time.sleep(delays.uniform(0, 0.001))
        if step == ask_at:
            stop.ask()
        if stop.reached(step):
            ends[process] = step
            return


@pytest.mark.parametrize("seed", range(12))
def test_all_end_after_the_same_step(seed: int):
    delays = random.Random(seed)
    count = 1 + seed % 4
    stops = joined(count, delays)
    # one of them, or several at once
    asked = {process: delays.randrange(1, 20) for process in delays.sample(range(count), 1 + seed % count)}
    ends = [0] * count
    threads = [
        threading.Thread(target=steps_of, args=(stop, random.Random(seed + process), asked.get(process), ends, process))
        for process, stop in enumerate(stops)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(ends)) == 1 and ends[0] >= min(asked.values()), (ends, asked)


def test_nobody_who_is_not_asked_stops():
    stops = joined(2, random.Random(0))
    assert not any(stop.reached(step) for step in range(1, 5) for stop in stops)
    assert not stops[0].hear(1, b"beat\n")

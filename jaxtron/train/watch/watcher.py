"""The watcher of a loop: ends a run whose step does not come, and names hosts that hold the others up.

Both go over the channel by which processes know of each other (`runtime/together.py`), never over the devices. What a
device itself takes is in no host's times, for collectives make all wait for the slowest: that is for the profiler.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxtron import interrupts
from jaxtron.run.configuration import Configuration
from jaxtron.run.metrics import Events
from jaxtron.runtime.together import Together, channel
from jaxtron.train.hooks import StepInfo
from jaxtron.train.watch import stacks
from jaxtron.train.watch.rules import MEASURES, StepRule, slow_hosts

TIMES, STACKS, HANGS = "times", "stacks", "hangs"
# between two looks at the steps
LOOK_SECONDS = 1.0
# for what the others say of themselves to arrive, and for process 0 to end them all
COLLECT_SECONDS, PATIENCE_SECONDS = 3.0, 15.0
# of steps that tell who is slow: fewer have too much of chance
LEAST_SECONDS = 1.0
# of a line that goes over the channel
LONGEST = 4000

Tell = Callable[[str, int, str, dict[str, Any]], None]


class Watcher:
    """Watches one loop's steps: `input` and `dispatch` are around their parts, and it is a hook after every step.

    `tell` writes an event and a line; its words are of process 0 alone.
    """

    def __init__(self, config: Configuration, directory: Path, step: int, tell: Tell) -> None:
        self._directory, self._every, self._tell = directory, config.run.log_every, tell
        self._process, self._host = jax.process_index(), socket.gethostname()
        self._channel: Together | None = channel()
        watchdog = config.train.watchdog
        self._rule = None if watchdog.factor is None else StepRule(watchdog, step, time.monotonic())
        self._lock = threading.Lock()
        self._part, self._shape, self._has_compiled = "input", None, False
        self._steps, self._began = 0, time.perf_counter()
        self._spent: dict[str, float] = dict.fromkeys(("input", "dispatch", "paused"), 0.0)
        # in process 0: times by step and process, and what processes say of a hang
        self._times: dict[int, dict[int, dict[str, Any]]] = {}
        self._hangs: dict[int, str] = {}
        self._is_ended = threading.Event()
        self._is_shown, self._is_ending = threading.Lock(), threading.Lock()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches in the block."""
        if self._channel is not None:
            for topic, hear in ((TIMES, self._hear_times), (STACKS, self._hear_wish), (HANGS, self._hear_hang)):
                self._channel.on_note(topic, hear)
        if self._rule is not None:
            self._thread.start()
        try:
            yield
        finally:
            self._is_ended.set()
            if self._rule is not None:
                self._thread.join(PATIENCE_SECONDS)
            self._name_slow()

    @contextmanager
    def input(self) -> Iterator[None]:
        """Around the wait for a batch."""
        with self._timed("input"):
            yield

    @contextmanager
    def dispatch(self, batch_size: int) -> Iterator[None]:
        """Around the call that gives a step to the devices; the first of a batch's size compiles."""
        compiles, self._shape = batch_size != self._shape, batch_size
        if not compiles:
            with self._timed("dispatch"):
                yield
            return
        self._has_compiled = True
        with self.paused():
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step: it may take as long as it likes."""
        began = time.perf_counter()
        if self._rule is not None:
            with self._lock:
                self._rule.pause()
        try:
            yield
        finally:
            self._spent["paused"] += time.perf_counter() - began
            if self._rule is not None:
                with self._lock:
                    self._rule.go_on(time.monotonic())

    def __call__(self, info: StepInfo) -> None:
        """After a step was dispatched."""
        if self._rule is not None:
            with self._lock:
                self._rule.dispatch(info.step, info.metrics["loss"].is_ready)
        self._steps += 1
        self._part = "what follows a step"
        if info.step % self._every == 0:
            self._send_times(info.step)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        self._part = part
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - began

    # slow hosts

    def _send_times(self, step: int) -> None:
        """This process's means since the last time, to process 0; which looks at those that have come."""
        now = time.perf_counter()
        # the first step after a compilation waits for all others'
        if self._channel is not None and not self._has_compiled:
            seconds = now - self._began - self._spent["paused"]
            mine = {
                "host": self._host,
                "input": self._spent["input"] / self._steps,
                "dispatch": self._spent["dispatch"] / self._steps,
                "step": seconds / self._steps,
            }
            if self._process == 0:
                self._times.setdefault(step, {})[0] = mine
                self._name_slow()
            else:
                self._channel.note(TIMES, json.dumps({"after": step, **mine}))
        self._steps, self._began, self._has_compiled = 0, now, False
        self._spent = dict.fromkeys(self._spent, 0.0)

    def _hear_times(self, other: int, text: str) -> None:
        found = json.loads(text)
        self._times.setdefault(found.pop("after"), {})[other] = found

    def _name_slow(self) -> None:
        """In process 0: one line for each step whose times have all come and tell of a slow host."""
        for step in sorted(self._times):
            if len(self._times[step]) < jax.process_count():
                continue
            times = [found for _, found in sorted(self._times.pop(step).items())]
            seconds = self._every * min(one["step"] for one in times)
            slow = slow_hosts(times) if seconds >= LEAST_SECONDS else {}
            if not slow:
                continue
            named = [_slow_text(process, times[process], parts) for process, parts in slow.items()]
            self._tell("stragglers", step, f"slower than the others: {'; '.join(named)}", {"hosts": named})

    # hangs

    def _look(self) -> None:
        assert self._rule is not None
        while not self._is_ended.wait(LOOK_SECONDS):
            with self._lock:
                if stacks.is_debugged():
                    self._rule.pause()
                    self._rule.go_on(time.monotonic())
                overdue = self._rule.look(time.monotonic())
            if overdue is not None and not interrupts.is_ending():
                self._end(
                    f"no step came for {overdue.seconds:.0f} s (limit {overdue.limit:.0f} s, train.watchdog): step "
                    f"{overdue.done} is done, {overdue.dispatched} was given to the devices"
                )

    def _hear_wish(self, _other: int, why: str) -> None:
        """Process 0 wants to know where this one is."""
        threading.Thread(target=self._show, args=(why,), daemon=True).start()

    def _hear_hang(self, other: int, text: str) -> None:
        """In process 0: where another process is, which noticed first or was asked."""
        self._hangs[other] = text
        if len(self._hangs) == 1:
            threading.Thread(target=self._end, args=(f"process {other} says: {text}",), daemon=True).start()

    def _show(self, why: str) -> None:
        """Stacks of this process, once, and a word to process 0."""
        if not self._is_shown.acquire(blocking=False):
            return
        text = f"process {self._process} on {self._host}, in {self._part}: {stacks.place()}"[:LONGEST]
        interrupts.say(f"watchdog: {why}; {text}")
        stacks.show(self._directory, self._process, f"{why}; {text}")
        if self._process:
            assert self._channel is not None
            self._channel.note(HANGS, text)
        else:
            self._hangs[0] = text

    def _end(self, why: str) -> None:
        """Shows all processes' stacks, records the hang, and ends the run; from a thread, once."""
        if not self._is_ending.acquire(blocking=False):
            return
        self._show(why)
        if self._process:
            assert self._channel is not None
            # process 0 ends this one, unless it hangs so that it hears nothing
            time.sleep(PATIENCE_SECONDS)
        else:
            if self._channel is not None:
                self._channel.note(STACKS, why)
                time.sleep(COLLECT_SECONDS)
            events = Events(self._directory)
            done = 0 if self._rule is None else self._rule.done
            answers = [self._hangs[number] for number in sorted(self._hangs)]
            silent = [number for number in range(jax.process_count()) if number not in self._hangs]
            events.write("hang", done, why=why, processes=answers, silent=silent)
            events.close()
            if silent:
                interrupts.say(f"watchdog: no answer from process {', '.join(map(str, silent))}")
        if self._channel is not None:
            self._channel.tell(f"ended a run that hangs: {why}")
        sys.stderr.flush()
        interrupts.leave(interrupts.TRY_AGAIN)


def _slow_text(process: int, times: dict[str, Any], parts: list[str]) -> str:
    measured = ", ".join(f"{measure} {times[measure]:.3g} s" for measure in MEASURES)
    return f"process {process} on {times['host']} in {' and '.join(parts)} ({measured})"

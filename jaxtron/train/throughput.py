"""Tokens a second and seconds a step, of training alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import jax

from jaxtron.typing import PyTree


@dataclass(frozen=True)
class Rate:
    """Speed over some steps; seconds are those of training alone."""

    steps: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the global batch a second."""
        return self.tokens / self.seconds

    @property
    def step_seconds(self) -> float:
        """Mean seconds of one step."""
        return self.seconds / self.steps


class Throughput:
    """Times steps in windows, without the first step, which compiles, and without what runs in `excluded`.

    Steps are dispatched ahead of the device, so the clock is read only where results are ready: call `measure` after
    fetching the window's last metrics. `excused` is entered around all that is excluded, for others who measure.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        excused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._clock = clock
        self._excused = excused
        self._window_start = clock()
        self._steps, self._tokens, self._excluded_seconds = 0, 0, 0.0
        self._first: Rate | None = None

    def finish_step(self, tokens: int, outputs: PyTree) -> None:
        """Count a dispatched step of `tokens`; the first one is waited for, by its `outputs`, and set aside."""
        if self._first is None:
            jax.block_until_ready(outputs)
            self._first = Rate(1, tokens, max(self._clock() - self._window_start - self._excluded_seconds, 1e-9))
            self._start_window()
        else:
            self._steps += 1
            self._tokens += tokens

    @contextmanager
    def excluded(self, outputs: PyTree) -> Iterator[None]:
        """Keep what runs inside out of the measure, once the last step's `outputs` are ready."""
        jax.block_until_ready(outputs)
        start = self._clock()
        try:
            with self._excused():
                yield
        finally:
            self._excluded_seconds += self._clock() - start

    def measure(self) -> Rate:
        """Return the speed since the last call; before a second step there is only the first, compilation included."""
        assert self._first is not None, "measure() comes after the first finish_step()"
        if self._steps == 0:
            return self._first
        # a clock that did not move is no division by zero
        seconds = max(self._clock() - self._window_start - self._excluded_seconds, 1e-9)
        rate = Rate(self._steps, self._tokens, seconds)
        self._start_window()
        return rate

    def _start_window(self) -> None:
        self._window_start = self._clock()
        self._steps, self._tokens, self._excluded_seconds = 0, 0, 0.0

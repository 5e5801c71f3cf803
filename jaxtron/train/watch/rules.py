"""When a step is overdue, and which hosts are slower than the others: rules on seconds alone."""

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtron.run.run_config import WatchdogConfig

# steps whose median is the usual one
WINDOW = 100
# the limit before there is a median, in floors: a first step starts up communication, and may just be long
FIRST_FLOORS = 6
# a look that comes so much later than the last, for this process was stopped or its machine slept, tells nothing
LATE_SECONDS = 30.0
# a host is slow in what takes it so much longer than the median, and that is so much of a step
SLOW_FACTOR, SLOW_PART = 1.2, 0.05


@dataclass(frozen=True)
class Overdue:
    """A step that did not end: the last one that did, the last one given to the devices, and how long nothing came."""

    done: int
    dispatched: int
    seconds: float
    limit: float


class StepRule:
    """Knows from looks at a clock whether a step is overdue; a look is cheap, and made every second or so.

    A step is done when its result is ready on the devices, which the host runs ahead of. What is paused does not count.
    """

    def __init__(self, config: WatchdogConfig, step: int, now: float) -> None:
        assert config.factor is not None
        self._factor, self._floor = config.factor, config.floor_seconds
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._pending: deque[tuple[int, Callable[[], bool]]] = deque()
        self.done = self._dispatched = step
        self._since = self._looked = now
        self._pauses = 0

    def dispatch(self, step: int, is_done: Callable[[], bool]) -> None:
        """A step was given to the devices; `is_done` says at once whether they have done it."""
        self._dispatched = step
        self._pending.append((step, is_done))

    def pause(self) -> None:
        """Something begins that is no step: compiling, saving, validating; pauses may lie in each other."""
        self._pauses += 1

    def go_on(self, now: float) -> None:
        """It is over."""
        self._pauses -= 1
        self._since = now

    def look(self, now: float) -> Overdue | None:
        """The step that is overdue at this moment, if one is."""
        late, self._looked = now - self._looked > LATE_SECONDS, now
        done = self.done
        while self._pending and self._pending[0][1]():
            self.done = self._pending.popleft()[0]
        if self._pauses or late:
            self._since = now
        elif self.done > done:
            self._seconds.append((now - self._since) / (self.done - done))
            self._since = now
        elif now - self._since > self.limit:
            return Overdue(self.done, self._dispatched, now - self._since, self.limit)
        return None

    @property
    def limit(self) -> float:
        """Seconds that a step may take now."""
        if not self._seconds:
            return FIRST_FLOORS * self._floor
        return max(self._floor, self._factor * statistics.median(self._seconds))


# what a host measures of its own steps, in seconds a step
Times = Mapping[str, float]
MEASURES = ("input", "dispatch", "step")


def slow_hosts(times: Sequence[Times]) -> dict[int, list[str]]:
    """The processes that are slow, by number, and in which of `MEASURES`, from the times of all."""
    found: dict[int, list[str]] = {}
    least = SLOW_PART * statistics.median(one["step"] for one in times)
    for measure in MEASURES:
        median = statistics.median(one[measure] for one in times)
        for process, one in enumerate(times):
            if one[measure] > SLOW_FACTOR * median and one[measure] - median > least:
                found.setdefault(process, []).append(measure)
    return found

"""What happens beside steps: hooks, and those that every run has."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxtron.config import UserError
from jaxtron.run.configuration import Configuration
from jaxtron.run.metrics import Events, MetricsTally, MetricsWriter, summarize
from jaxtron.train.progress import TrainProgress
from jaxtron.train.throughput import Throughput
from jaxtron.train.trackers import Tracker
from jaxtron.typing import PyTree


@dataclass(frozen=True)
class StepInfo:
    """A finished step, counted from 1: its metrics, still on the device, and the state it left.

    A hook may add to `metrics` (validation adds `validation_loss`); hooks after it see that. `tokens` are those of the
    step, and `samples` its samples' numbers in the order of the data, from the first to before the second.
    """

    step: int
    total_steps: int
    state: PyTree
    metrics: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    samples: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class RunStart:
    """What a hook is told before a command's first step: the run's directory, settings, and steps so far."""

    directory: Path
    config: Configuration
    step: int


@dataclass(frozen=True)
class RunEvent:
    """Something that happened to a run after a step: as `events.jsonl` has it, and the line for its user, if any."""

    name: str
    step: int
    about: Mapping[str, Any]
    line: str = ""


class RunHook:
    """Something beside the loop; whatever method a class has of its own is called, and the others do nothing.

    `start` comes once a command, before its first step; `after` follows every `every`-th step, and with `at_end` the
    last one; `event` whatever happens in between, returns to a checkpoint among it; `close` the end, however it comes.
    Every process has its own. An error of any of them ends the run. `excluded` keeps the time of `after` out of the
    throughput: validation, checkpoints.
    """

    every: int = 1
    at_end: bool = True
    excluded: bool = False

    def is_due(self, info: StepInfo) -> bool:
        """Whether to call `after` for this step."""
        return info.step % self.every == 0 or (self.at_end and info.step == info.total_steps)

    def start(self, run: RunStart) -> None:
        """The command is about to take its first step."""

    def after(self, info: StepInfo) -> None:
        """A step is done; its metrics are arrays that may not be computed yet."""

    def event(self, event: RunEvent) -> None:
        """Something happened."""

    def close(self) -> None:
        """The run ended: complete, stopped, or by an error."""


@dataclass(frozen=True)
class Hook(RunHook):
    """A function as a hook: to call after steps."""

    function: Callable[[StepInfo], None]
    every: int = 1
    at_end: bool = True
    excluded: bool = False

    def after(self, info: StepInfo) -> None:
        """Call it."""
        self.function(info)


def run_hooks(hooks: Iterable[RunHook], info: StepInfo, throughput: Throughput) -> None:
    """Call the hooks that are due after a step, in order."""
    for hook in hooks:
        if hook.is_due(info):
            with throughput.excluded(info.metrics) if hook.excluded else nullcontext():
                hook.after(info)


class HookList:
    """Hooks of a command, and those that are added for some of its steps; all hear of its events, in order."""

    def __init__(self, hooks: Iterable[RunHook] = ()) -> None:
        self._hooks = list(hooks)

    def start(self, run: RunStart) -> None:
        """Tell all that the first step comes."""
        for hook in self._hooks:
            hook.start(run)

    def after(self, info: StepInfo, throughput: Throughput) -> None:
        """Tell those that are due of a step."""
        run_hooks(self._hooks, info, throughput)

    def event(self, name: str, step: int, line: str = "", about: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Tell all of an event."""
        for hook in self._hooks:
            hook.event(RunEvent(name, step, about, line))

    @contextmanager
    def joined_by(self, hooks: Iterable[RunHook]) -> Iterator[None]:
        """In the block these come before the others; they are closed with it."""
        more = list(hooks)
        self._hooks[:0] = more
        try:
            yield
        finally:
            del self._hooks[: len(more)]
            HookList(more).close()

    def close(self) -> None:
        """Close all, also where one fails; the first of such errors is raised."""
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.callback(hook.close)


class EventsLog(RunHook):
    """Writes `events.jsonl`, on process 0."""

    def __init__(self) -> None:
        self._events: Events | None = None

    def start(self, run: RunStart) -> None:
        """The first event makes the file."""
        self._events = Events(run.directory)

    def event(self, event: RunEvent) -> None:
        """A line."""
        assert self._events is not None, "events come after the start"
        self._events.write(event.name, event.step, **event.about)

    def close(self) -> None:
        """Close the file, if it was begun."""
        if self._events is not None:
            self._events.close()


class MetricsLog(RunHook):
    """Writes logged steps to `metrics.jsonl`, the trackers and the progress; on process 0, after every step.

    A step is logged every `every`-th time, at the end, and where validation was measured; its loss is the mean since
    the last line. Of a metric that is an array, such as one by layer, the line has the mean and the extremes, and the
    file of arrays all of it; each process has it whole. `tally` goes on from that of an earlier command. `utilization`
    gives the MFU of tokens a second; None where the device's peak is unknown.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        progress: TrainProgress,
        throughput: Throughput,
        *,
        every: int,
        trackers: Sequence[Tracker] = (),
        utilization: Callable[[float], float] | None = None,
        tally: MetricsTally | None = None,
    ):
        self._writer = writer
        self._progress = progress
        self._throughput = throughput
        self._every = every
        self._trackers = trackers
        self._utilization = utilization
        self._tally = tally or MetricsTally()
        # still on the device
        self._losses: list[Any] = []
        self.last: dict[str, float | int | str] = {}

    def after(self, info: StepInfo) -> None:
        """Log the step if it is due, and show it in any case."""
        self._tally.tokens += info.tokens
        self._losses.append(info.metrics["loss"])
        is_due = info.step % self._every == 0 or info.step == info.total_steps or "validation_loss" in info.metrics
        if not is_due:
            self._progress.update(info.step)
            return
        # fetching waits for the step, so the rate after it is of work done
        fetched = {name: np.asarray(value) for name, value in jax.device_get(info.metrics).items()}
        arrays = {name: value for name, value in fetched.items() if value.ndim}
        measured = {name: value.item() for name, value in fetched.items() if not value.ndim} | summarize(arrays)
        tally, rate = self.tally(), self._throughput.measure()
        measured["loss"] = tally.loss_sum / tally.steps if tally.steps else float("nan")
        tally.steps, tally.loss_sum = 0, 0.0
        measured |= {"tokens_per_second": rate.tokens_per_second, "step_seconds": rate.step_seconds}
        if self._utilization is not None:
            measured["mfu"] = self._utilization(rate.tokens_per_second)
        figures = {"tokens": tally.tokens, "loss": measured["loss"], **measured, **_peak_memory()}
        self.last = {**figures, **_place_and_time()}
        self._writer.write(info.step, self.last, arrays)
        for tracker in self._trackers:
            tracker.log(info.step, figures)
        self._progress.update(info.step, figures)

    def tally(self) -> MetricsTally:
        """The tally up to this step, whose losses are waited for; those that are not finite are of no step applied."""
        losses, self._losses = jax.device_get(self._losses), []
        for loss in filter(math.isfinite, map(float, losses)):
            self._tally.loss_sum += loss
            self._tally.steps += 1
        return self._tally

    def event(self, event: RunEvent) -> None:
        """Show its line between those of the steps."""
        if event.line:
            self._progress.message(event.line)

    def close(self) -> None:
        """Close the file, the trackers and the progress."""
        self._progress.close()
        self._writer.close()
        for tracker in self._trackers:
            tracker.close()


def _place_and_time() -> dict[str, str | int]:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": now, "device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def _peak_memory() -> dict[str, int]:
    """The most bytes in use on a device of this process since it started; nothing where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"peak_memory_bytes": max(peaks)} if peaks else {}


class Profiler(RunHook):
    """Traces a range of steps with `jax.profiler` into `directory`."""

    def __init__(self, directory: Path, steps: tuple[int, int]):
        self._directory = directory
        self._first, self._last = steps
        self._is_tracing = False
        self._earlier: set[Path] = set()

    def after(self, info: StepInfo) -> None:
        """Begin the trace before the first step of the range, end it after the last."""
        if not self._is_tracing and self._first - 1 <= info.step < self._last:
            jax.block_until_ready(info.metrics)
            self._earlier = set(self._directory.rglob("*.xplane.pb"))
            jax.profiler.start_trace(str(self._directory))
            self._is_tracing = True
        elif self._is_tracing and info.step >= self._last:
            jax.block_until_ready(info.metrics)
            self.close()

    def close(self) -> None:
        """End the trace if the run stops inside the range."""
        if not self._is_tracing:
            return
        self._is_tracing = False
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:
            # a disk that is full, for one; the profiler leaves an empty file
            for path in set(self._directory.rglob("*.xplane.pb")) - self._earlier:
                path.unlink(missing_ok=True)
            reason = str(error).rpartition(";")[2].strip()
            raise UserError(
                f"the trace of run.profile_steps cannot be written to {self._directory}: {reason}; make room, or leave "
                "run.profile_steps out, and give the same command again"
            ) from None

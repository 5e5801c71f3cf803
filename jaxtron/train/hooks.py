"""What happens between steps: callables with an `every`, and the two that every run has."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtron.config import UserError
from jaxtron.run.metrics import MetricsTally, MetricsWriter, summarize
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
class Hook:
    """Something to call after every `every`-th step, and after the last one.

    `excluded` keeps its time out of the throughput: validation, checkpoints.
    """

    function: Callable[[StepInfo], None]
    every: int = 1
    at_end: bool = True
    excluded: bool = False

    def is_due(self, info: StepInfo) -> bool:
        """Whether to call it after this step."""
        return info.step % self.every == 0 or (self.at_end and info.step == info.total_steps)


def run_hooks(hooks: Iterable[Hook], info: StepInfo, throughput: Throughput) -> None:
    """Call the hooks that are due, in order."""
    for hook in hooks:
        if hook.is_due(info):
            with throughput.excluded(info.metrics) if hook.excluded else nullcontext():
                hook.function(info)


class MetricsLog:
    """Writes logged steps to `metrics.jsonl`, the trackers and the progress; call it on process 0, after every step.

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

    def __call__(self, info: StepInfo) -> None:
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

    def message(self, text: str) -> None:
        """Show a line between those of the steps."""
        self._progress.message(text)

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


class Profiler:
    """Traces a range of steps with `jax.profiler` into `directory`; call it after every step."""

    def __init__(self, directory: Path, steps: tuple[int, int]):
        self._directory = directory
        self._first, self._last = steps
        self._is_tracing = False
        self._earlier: set[Path] = set()

    def __call__(self, info: StepInfo) -> None:
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

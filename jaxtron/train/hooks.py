"""What happens between steps: callables with an `every`, and the two that every run has."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxtron.config import UserError
from jaxtron.train.metrics import MetricsWriter
from jaxtron.train.progress import Progress
from jaxtron.train.throughput import Throughput
from jaxtron.train.trackers import Tracker
from jaxtron.typing import PyTree


@dataclass(frozen=True)
class StepInfo:
    """A finished step, counted from 1: its metrics, still on the device, and the state it left.

    A hook may add to `metrics` (validation adds `validation_loss`); hooks after it see that.
    """

    step: int
    total_steps: int
    state: PyTree
    metrics: dict[str, Any] = field(default_factory=dict)


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

    A step is logged every `every`-th time, at the end, and where validation was measured. `utilization` gives the MFU
    of tokens a second; None where the device's peak is unknown.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        throughput: Throughput,
        *,
        every: int,
        trackers: Sequence[Tracker] = (),
        utilization: Callable[[float], float] | None = None,
    ):
        self._writer = writer
        self._progress = progress
        self._throughput = throughput
        self._every = every
        self._trackers = trackers
        self._utilization = utilization
        self.last: dict[str, float] = {}

    def __call__(self, info: StepInfo) -> None:
        """Log the step if it is due, and show it in any case."""
        is_due = info.step % self._every == 0 or info.step == info.total_steps or "validation_loss" in info.metrics
        if not is_due:
            self._progress.update(info.step)
            return
        # fetching waits for the step, so the rate after it is of work done
        metrics = {name: float(value) for name, value in jax.device_get(info.metrics).items()}
        rate = self._throughput.measure()
        metrics["tokens_per_second"] = rate.tokens_per_second
        metrics["step_seconds"] = rate.step_seconds
        if self._utilization is not None:
            metrics["mfu"] = self._utilization(rate.tokens_per_second)
        self.last = metrics
        self._writer.write(info.step, metrics)
        for tracker in self._trackers:
            tracker.log(info.step, metrics)
        self._progress.update(info.step, metrics)

    def close(self) -> None:
        """Close the file, the trackers and the progress."""
        self._progress.close()
        self._writer.close()
        for tracker in self._trackers:
            tracker.close()


class Profiler:
    """Traces a range of steps with `jax.profiler` into `directory`; call it after every step.

    UserError if the range ends after the run does.
    """

    def __init__(self, directory: Path, steps: tuple[int, int], total_steps: int):
        self._directory = directory
        self._first, self._last = steps
        self._is_tracing = False
        if self._last > total_steps:
            raise UserError(
                f"run.profile_steps={self._first} {self._last} ends after train.steps={total_steps}: end it earlier"
            )

    def __call__(self, info: StepInfo) -> None:
        """Begin the trace before the first step of the range, end it after the last."""
        if not self._is_tracing and self._first - 1 <= info.step < self._last:
            jax.block_until_ready(info.metrics)
            jax.profiler.start_trace(str(self._directory))
            self._is_tracing = True
        elif self._is_tracing and info.step >= self._last:
            jax.block_until_ready(info.metrics)
            self.close()

    def close(self) -> None:
        """End the trace if the run stops inside the range."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False

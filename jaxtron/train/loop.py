"""The training loop: batch, step, hooks."""

import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxtron.data.loader import Loader
from jaxtron.gpus import peak_flops
from jaxtron.models.cost import model_flops_per_token
from jaxtron.train.divergence import Watch, check_state
from jaxtron.train.history import Recorder
from jaxtron.train.hooks import Hook, MetricsLog, Profiler, StepInfo, run_hooks
from jaxtron.train.metrics import MetricsWriter, Tally
from jaxtron.train.progress import Progress
from jaxtron.train.setup import Run
from jaxtron.train.step import TrainState, jit_step
from jaxtron.train.throughput import Throughput
from jaxtron.train.trackers import make_trackers
from jaxtron.train.validation import check_loss, validate


@dataclass
class Outcome:
    """Where a loop ended: the last state, the step it is of, and whether a signal asked for the stop.

    `validation_loss` is that of the last state, None where the loop did not measure it or there are no such data.
    """

    state: TrainState
    step: int
    stopped: bool = False
    validation_loss: float | None = None


def train(run: Run) -> Outcome:
    """Steps from the run's own to the last; a SIGTERM or Ctrl-C ends it after the current step, with a checkpoint."""
    total = run.config.train.steps
    outcome = Outcome(run.state, run.step)
    if run.step >= total:
        return outcome
    throughput = Throughput()
    step = jit_step(run.trainer)
    with ExitStack() as stack:
        stop = stack.enter_context(_StopSignals())
        loader = stack.enter_context(run.train_loader())
        loss_scale = None if run.state.loss_scale is None else run.config.train.loss_scale
        watch = Watch(run.checkpoints, every=run.config.run.log_every, loss_scale=loss_scale)
        log = _metrics_log(run, throughput, stack) if jax.process_index() == 0 else None
        saver = Saver(run, loader, watch, log)
        hooks = [Hook(watch), *_hooks(run, saver, log, outcome, stack)]
        for number in range(run.step + 1, total + 1):
            batch = next(loader)
            outcome.state, metrics = step(outcome.state, run.placement.globalize(batch))
            outcome.step = number
            info = StepInfo(number, total, outcome.state, metrics, batch.size * run.config.data.sequence_length)
            throughput.finish_step(info.tokens, metrics)
            run_hooks(hooks, info, throughput)
            if stop.is_due(number) and number < total:
                saver.save(info)
                outcome.stopped = True
                break
        run.checkpoints.wait()
    return outcome


class Saver:
    """Saves a checkpoint; a state that is not finite, or whose loss is not, is an error, so that none is resumed from.

    Calls other than the hook's are for a run that is to stop at once: they do not wait for a loss.
    """

    def __init__(self, run: Run, loader: Loader, watch: Watch, log: MetricsLog | None) -> None:
        self._run = run
        self._loader = loader
        self._watch = watch
        self._log = log

    def __call__(self, info: StepInfo) -> None:
        """Save the state that the step left, and the position of the data after it."""
        if "validation_loss" not in info.metrics:
            check_loss(self._run, info.state)
        self.save(info)

    def save(self, info: StepInfo) -> None:
        """The same, with a loss that would take long to compile left out."""
        self._watch.check()
        check_state(self._run.checkpoints, info.step, info.state)
        # of the processes without a log nothing but their arrays is stored
        tally = Tally() if self._log is None else self._log.tally()
        self._run.save(info.step, info.state, self._loader.position, tally)


def _hooks(run: Run, saver: Saver, log: MetricsLog | None, outcome: Outcome, stack: ExitStack) -> list[Hook]:
    config, total = run.config, run.config.train.steps

    def validation(info: StepInfo) -> None:
        loss = validate(run, info.state)
        if loss is not None:
            outcome.validation_loss = info.metrics["validation_loss"] = loss

    every = config.train.validate_every or total
    hooks = [Hook(validation, every=every, excluded=True)]
    if log is not None:
        found, notes = run.continuation.changes, run.data.notes
        hooks.append(Hook(Recorder(run.directory, config, found, first_step=run.step, notes=notes)))
        hooks.append(Hook(log))
        if config.run.profile_steps is not None:
            profiler = Profiler(run.directory / "profile", config.run.profile_steps, total)
            stack.callback(profiler.close)
            hooks.append(Hook(profiler))
    hooks.append(Hook(saver, every=config.checkpoint.every or total, excluded=True))
    return hooks


def _metrics_log(run: Run, throughput: Throughput, stack: ExitStack) -> MetricsLog:
    config = run.config
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = model_flops_per_token(config.model, config.data.sequence_length)
    log = MetricsLog(
        MetricsWriter(run.directory / "metrics.jsonl", resume_step=run.step),
        Progress(config.train.steps, shown=True, first_step=run.step, print_seconds=config.run.print_seconds),
        throughput,
        every=config.run.log_every,
        trackers=make_trackers(config.run, run.directory, config.model_dump(mode="json"), resume_step=run.step),
        utilization=None if peak is None else lambda rate: rate * flops / (peak * jax.device_count()),
        tally=run.tally,
    )
    stack.callback(log.close)
    return log


class _StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop honours after its step."""

    def __init__(self) -> None:
        self._is_requested = False
        self._is_alone = jax.process_count() == 1
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_StopSignals":
        # with several processes SIGTERM is heard by JAX's preemption service, which tells the others
        for number in (signal.SIGTERM, signal.SIGINT) if self._is_alone else (signal.SIGINT,):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_due(self, step: int) -> bool:
        """Whether the run ends after this step; the same on every process, all of which ask after each step."""
        return self._is_requested if self._is_alone else multihost_utils.reached_preemption_sync_point(step)

    def _request(self, number: int, _frame: object) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
        if number == signal.SIGINT:
            print("stopping after this step; once more to stop at once", file=sys.stderr)
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

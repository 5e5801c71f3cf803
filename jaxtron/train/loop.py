"""The training loop: batch, step, hooks."""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import jax

from jaxtron.checkpoint.processes import gather_texts
from jaxtron.checkpoint.tiers.copies import Copies
from jaxtron.data.loader import Loader
from jaxtron.gpus import peak_flops
from jaxtron.interrupts import StopRequest, finish_first
from jaxtron.run.history import Recorder
from jaxtron.run.metrics import MetricsTally, MetricsWriter
from jaxtron.run.state import TrainState
from jaxtron.run.trainable import flops_per_token
from jaxtron.runtime.together import common_stop
from jaxtron.train.divergence import Rewind, Tell, Watch, check_state, diverged
from jaxtron.train.hooks import Hook, HookList, MetricsLog, Profiler, RunHook, RunStart, StepInfo
from jaxtron.train.integrity.places import Places
from jaxtron.train.integrity.replay import Replay, check_replay
from jaxtron.train.integrity.replicas import Replicas
from jaxtron.train.progress import TrainProgress
from jaxtron.train.run_lock import STOP_FILE
from jaxtron.train.setup import Run, go_back
from jaxtron.train.throughput import Throughput
from jaxtron.train.trackers import make_trackers
from jaxtron.train.validation import check_loss, validate
from jaxtron.train.watch.watcher import Watcher

# between two looks for a file
LOOK_SECONDS = 1.0


@dataclass
class TrainOutcome:
    """Where a loop ended: the last state, the step it is of, and whether a signal asked for the stop.

    `validation` has the figures of the last state by name, none where the loop did not measure them or there are no
    such data. `reason` is why it stopped where no signal asked for it; `copies` how many were made and the seconds they
    took, of `seconds` in which steps were taken after the first, which compiles.
    """

    state: TrainState
    step: int
    stopped: bool = False
    reason: str = ""
    validation: dict[str, float] = field(default_factory=dict)
    copies: tuple[int, float] | None = None
    seconds: float = 0.0

    def count_seconds(self, since: float) -> None:
        """Add the time until now."""
        self.seconds += time.perf_counter() - since


def train(run: Run, begun: float | None = None, hooks: HookList | None = None) -> TrainOutcome:
    """Steps from the run's own to the last; a SIGTERM or Ctrl-C ends it after the current step, with a checkpoint.

    So do `run.max_minutes` after the moment `begun` (of `time.monotonic`; none: now), and a file in the directory.
    With `train.health.on_bad` rewind the run goes back to its newest checkpoint after a bad step, and leaves out the
    data from there to that step's. `hooks` are told of all of it, but for a complete end, and not closed.
    """
    hooks = HookList() if hooks is None else hooks
    total, health = run.config.train.steps, run.config.train.health
    outcome = TrainOutcome(run.state, run.step)
    if run.step >= total:
        return outcome
    with ExitStack() as stack:
        stop = _Stop(stack, run, time.monotonic() if begun is None else begun)
        hooks.start(RunStart(run.directory, run.config, run.step))
        if run.tier:
            hooks.event("restored", run.step, about={"tier": run.tier})
        returns = 0
        while True:
            begun = run.step
            try:
                _steps(run, outcome, stop, hooks, is_first=returns == 0)
                break
            except Rewind as rewind:
                # its memory is needed
                jax.tree.map(lambda array: array.delete(), outcome.state)
                run = go_back(run, rewind.position)
                returns = returns + 1 if run.step == begun else 1
                if returns > health.patience:
                    what = f"{rewind.why}, and going back to step {run.step} has not helped"
                    raise diverged(
                        run.checkpoints, run.step, f"{what} {returns} times (train.health.patience {health.patience})"
                    ) from None
                outcome.state, outcome.step = run.state, run.step
                line = f"back to step {run.step}, and on with sample {run.position:,}"
                about = {"to_step": run.step, "position": run.position} | ({"tier": run.tier} if run.tier else {})
                hooks.event("rewind", rewind.step, line, about)
                if jax.process_index() == 0:
                    print(line, flush=True)
        run.checkpoints.wait()
        if run.copies is not None:
            outcome.copies = run.copies.count, run.copies.seconds
            # what they are copies of is a checkpoint now
            run.copies.close(remove=True)
        outcome.stopped = outcome.stopped or stop.was_asked()
        tell_removed(run, hooks, outcome.step)
        if outcome.stopped:
            hooks.event("stopped", outcome.step, about={"why": stop.reason or "a signal"})
        outcome.reason = stop.reason
    return outcome


def _steps(run: Run, outcome: TrainOutcome, stop: "_Stop", hooks: HookList, *, is_first: bool) -> None:
    """Steps from the run's own on, into the outcome; `is_first` of a command."""
    config, total = run.config, run.config.train.steps
    watcher = Watcher(config, run.directory, run.step, hooks.event)
    throughput = Throughput(excused=watcher.paused)
    with ExitStack() as stack:
        loader = stack.enter_context(run.train_loader())
        replay, replicas = _checks(run, hooks.event)
        watch = Watch(
            run.checkpoints,
            every=config.run.log_every,
            loss_scale=None if run.state.loss_scale is None else config.train.loss_scale,
            health=config.train.health,
            state=run.state.health,
            tell=hooks.event,
        )
        log = _metrics_log(run, throughput) if jax.process_index() == 0 else None
        saver = Saver(run, loader, watch, log, hooks, replicas)
        own = [Hook(watch), *_hooks(run, saver, log, outcome, is_first=is_first)]
        if replicas is not None:
            own.insert(1, Hook(replicas, excluded=True))
        if run.copies is not None:
            own.append(Copier(run, run.copies, saver, hooks))
        stack.enter_context(hooks.joined_by(own))
        stack.enter_context(watcher.watching())
        for number in range(run.step + 1, total + 1):
            with watcher.input():
                batch = next(loader)
            arrays = run.session.batches.globalize(batch)
            if replay is not None and replay.is_due(number):
                with throughput.excluded(outcome.state):
                    replay(number, outcome.state, arrays)
            with watcher.dispatch(batch.size):
                outcome.state, metrics = run.session.step(outcome.state, arrays)
            outcome.step = number
            tokens = batch.size * config.data.sequence_length
            info = StepInfo(number, total, outcome.state, metrics, tokens, (batch.start, batch.end))
            watcher(info)
            throughput.finish_step(info.tokens, metrics)
            if number == run.step + 1:
                stack.callback(outcome.count_seconds, time.perf_counter())
            stop.begin()
            hooks.after(info, throughput)
            if stop.is_due(number) and number < total:
                with watcher.paused():
                    saver.save(info)
                outcome.stopped = True
                break


class Saver(RunHook):
    """Saves checkpoints; a state that is not finite, or whose loss is not, is an error, so that none is resumed from.

    Calls other than the hook's are for a run that is to stop at once: they do not wait for a loss.
    """

    def __init__(
        self,
        run: Run,
        loader: Loader,
        watch: Watch,
        log: MetricsLog | None,
        hooks: HookList,
        replicas: Replicas | None = None,
    ) -> None:
        self.every, self.excluded = run.config.checkpoint.every or run.config.train.steps, True
        self._hooks, self._replicas = hooks, replicas
        self._run = run
        self._loader = loader
        self._watch = watch
        self._log = log

    def after(self, info: StepInfo) -> None:
        """Save the state that the step left, and the position of the data after it."""
        if "validation_loss" not in info.metrics:
            check_loss(self._run, info.state)
        self.save(info)

    def save(self, info: StepInfo) -> None:
        """The same, with a loss that would take long to compile left out."""
        self.check(info)
        check_state(self._run.checkpoints, info.step, info.state)
        tally = self.tally()
        position, loss = self._loader.position, info.metrics.get("validation_loss")
        self._run.save(info.step, info.state, position, tally, loss)
        about = {"position": position} | ({} if loss is None else {"validation_loss": loss})
        self._hooks.event("checkpoint", info.step, about=about)
        tell_removed(self._run, self._hooks, info.step)

    def check(self, info: StepInfo) -> None:
        """Whether there is anything against keeping this state: `UserError` or `Rewind`."""
        self._watch.check()
        if self._replicas is not None:
            self._replicas.check(info)

    def tally(self) -> MetricsTally:
        """What the next line of metrics adds up so far; of processes without a log nothing but arrays is stored."""
        return MetricsTally() if self._log is None else self._log.tally()

    @property
    def position(self) -> int:
        """That of the data after the last step."""
        return self._loader.position


class Copier(RunHook):
    """Copies the state beside its checkpoints, where it is time to; the last one is saved anyway."""

    excluded = True

    def __init__(self, run: Run, copies: Copies, saver: Saver, hooks: HookList) -> None:
        self._run, self._copies, self._saver, self._hooks = run, copies, saver, hooks

    def is_due(self, info: StepInfo) -> bool:
        """Whether there is a place that gets a copy after this step."""
        return self._copies.is_due(info.step) and info.step < info.total_steps

    def after(self, info: StepInfo) -> None:
        """Copy it, unless there is anything against it, and tell of earlier ones that could not be written."""
        self._saver.check(info)
        self._copies.save(info.step, info.state, self._run.extra(self._saver.position, self._saver.tally()))
        for step, why in self._copies.take_problems():
            line = f"no copy of step {step} in {why}; the run goes on without it"
            self._hooks.event("copy_failed", step, line, {"why": why})


def _checks(run: Run, tell: Tell) -> tuple[Replay | None, Replicas | None]:
    """What looks for devices that compute wrong, where it was asked for."""
    health = run.config.train.health
    if health.replay_every is None and health.compare_every is None:
        return None, None
    if health.replay_every is not None and not run.config.runtime.deterministic:
        check_replay(run.session.mesh.devices.flat[0].platform, health.replay_every)
    given = (run.session, run.checkpoints, Places.of(run.session.mesh), health, tell)
    replay = None if health.replay_every is None else Replay(*given)
    return replay, None if health.compare_every is None else Replicas(*given)


def tell_removed(run: Run, hooks: HookList, step: int) -> None:
    """An event of the checkpoints that were deleted since the last one, for newer or better ones took their place."""
    removed = run.checkpoints.take_removed()
    if removed:
        hooks.event("checkpoints_removed", step, about={"steps": removed})


def _hooks(run: Run, saver: Saver, log: MetricsLog | None, outcome: TrainOutcome, *, is_first: bool) -> list[RunHook]:
    config, total = run.config, run.config.train.steps

    def validation(info: StepInfo) -> None:
        found = validate(run, info.state)
        outcome.validation = found or outcome.validation
        info.metrics.update(found)

    every = config.train.validate_every or total
    hooks: list[RunHook] = [Hook(validation, every=every, excluded=True)]
    if log is not None:
        found, notes = run.continuation.changes, run.data.notes
        if is_first:
            record = Recorder(run.directory, config, found, first_step=run.step, notes=notes, origin=run.origin)
            hooks.append(Hook(record))
        hooks.append(log)
        if config.run.profile_steps is not None:
            hooks.append(Profiler(run.directory / "profile", config.run.profile_steps))
    return [*hooks, saver]


def _metrics_log(run: Run, throughput: Throughput) -> MetricsLog:
    config = run.config
    peak = peak_flops(jax.devices()[0].device_kind)
    blueprint = run.session.trainer.blueprint
    flops = flops_per_token(config.family, config.model, config.data.sequence_length, blueprint)
    return MetricsLog(
        MetricsWriter(run.directory / "metrics.jsonl", resume_step=run.step),
        TrainProgress(config.train.steps, shown=True, first_step=run.step, print_seconds=config.run.print_seconds),
        throughput,
        every=config.run.log_every,
        trackers=make_trackers(config.run, run.directory, config.model_dump(mode="json"), resume_step=run.step),
        utilization=None if peak is None else lambda rate: rate * flops / (peak * jax.device_count()),
        tally=run.tally,
    )


class _Stop:
    """Ends the loop after a step, with a checkpoint: a signal asks for it, the time is over, or a file is there.

    With several processes it becomes one of all of them.
    """

    def __init__(self, stack: ExitStack, run: Run, begun: float) -> None:
        self._common = common_stop()
        self._stack = stack
        self._request: StopRequest | None = None
        minutes = run.config.run.max_minutes
        self._deadline = math.inf if minutes is None else begun + 60 * minutes
        # the first process's to see
        self._file = run.directory / STOP_FILE if jax.process_index() == 0 else None
        self._next_look = 0.0
        self.reason = ""

    def begin(self) -> None:
        """From here on there is something to finish: before the first step of a run nothing is lost by stopping."""
        if self._request is None:
            tell = (lambda: None) if self._common is None else self._common.ask
            notice = "stopping after this step; once more to stop at once"
            self._request = self._stack.enter_context(finish_first(notice, tell))

    def is_due(self, step: int) -> bool:
        """Whether the run ends after this step; the same on every process, all of which ask after each step."""
        if not self.reason:
            self.reason = self._found()
            if self.reason and self._common is not None:
                self._common.ask()
        return bool(self.reason) or self._is_made if self._common is None else self._common.reached(step)

    def was_asked(self) -> bool:
        """Whether a signal asked any process while the loop ended; all of them call this once."""
        return self._is_made if self._common is None else "asked" in gather_texts("asked" if self._is_made else "")

    def _found(self) -> str:
        now = time.monotonic()
        if now >= self._deadline:
            return "run.max_minutes are over"
        if self._file is not None and now >= self._next_look:
            # a file system far away takes its time
            self._next_look = now + LOOK_SECONDS
            if self._file.exists():
                return f"{self._file} is there"
        return ""

    @property
    def _is_made(self) -> bool:
        return self._request is not None and self._request.is_made

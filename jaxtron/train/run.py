"""A run from its configuration to its summary, once JAX may be imported."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax

from jaxtron.run.attention import attention_lines
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import write_end
from jaxtron.runtime.determinism import determinism_line
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.runtime.start import start_runtime
from jaxtron.runtime.together import leaving_together
from jaxtron.train.divergence import Diverged
from jaxtron.train.hooks import EventsLog, HookList, RunHook
from jaxtron.train.loop import train
from jaxtron.train.plots import Pictures
from jaxtron.train.setup import Run, open_run
from jaxtron.train.summary import Sampler, finish
from jaxtron.train.watch.stacks import show_on_signal


def run(config: Configuration, name: str, sampler: Sampler, own_hooks: Sequence[RunHook] = ()) -> int:
    """Trains to the last step; 130 if a signal, the time or a file ended the run early, with a checkpoint.

    `name` names its directory; the sampler draws the text that a run ends with. `own_hooks` come after the run's.
    """
    begun = time.monotonic()
    show_on_signal()
    start_runtime(config.runtime, devices=config.devices, split=config.mesh.split)
    room = partial(out_of_memory_as_user_error, room_advice(config))
    # an error is told before the run is closed, which may need the others
    with (
        leaving_together(),
        room(),
        open_run(config, name) as run,
        leaving_together(),
        room(),
        contextlib.ExitStack() as closing,
    ):
        if jax.process_index() == 0:
            announce(run)
        recording = [EventsLog(), Pictures()] if jax.process_index() == 0 else []
        hooks = closing.enter_context(contextlib.closing(HookList([*recording, *own_hooks])))
        with _divergence_on_record(run):
            outcome = train(run, begun, hooks)
        if outcome.stopped:
            if jax.process_index() == 0:
                last = outcome.step == config.train.steps
                then = "the last, which is saved" if last else "the same command continues from its checkpoint"
                why = f", for {outcome.reason}" if outcome.reason else ""
                print(f"stopped after step {outcome.step}{why}{',' if last else ';'} {then}")
            return 130
        with _divergence_on_record(run):
            finish(run, outcome, sampler, hooks)
    return 0


@contextmanager
def _divergence_on_record(run: Run) -> Iterator[None]:
    """A training that diverges says so in the run's history, for who looks at its directory later."""
    try:
        yield
    except Diverged as error:
        if jax.process_index() == 0:
            write_end(run.directory, "diverged", error.after, str(error))
        raise


def room_advice(config: Configuration) -> str:
    """What to do where a run needs more memory than there is."""
    levels = config.family.recompute(config.model)
    again = f", set --model.recompute {levels[-1]}" if levels else ""
    return f"Raise --train.microbatches or --mesh.fsdp{again}, or choose a smaller model"


def announce(run: Run) -> None:
    """One line of what is about to run, and one if it continues."""
    session = run.session
    mesh = " x ".join(f"{flag} {size}" for flag, size in session.sizes.items() if size > 1)
    devices = f"{jax.device_count()} {session.device_kind}"
    where = f"{devices}{f' ({mesh})' if mesh else ''}"
    whole, trained = session.blueprint.num_parameters, session.blueprint.num_trained
    counts = f"{whole:,} parameters" + (f", {trained:,} of them trained," if trained < whole else "")
    print(f"{counts} on {where}, run in {run.directory}")
    for line in (*attention_lines(session.attention), *session.choices):
        print(line)
    if line := determinism_line(run.config.runtime, session.device_kind):
        print(line)
    for line in run.data.notes:
        print(line)
    optimizer, steps = run.config.optimizer, run.config.train.steps
    if optimizer.warmup_steps >= steps:
        print(
            f"optimizer.warmup_steps {optimizer.warmup_steps:,} is not below train.steps {steps:,}: the learning rate "
            f"does not reach {optimizer.learning_rate:g}"
        )
    # one of step 0 was made of another run's
    if run.checkpoints.latest_step() is not None or run.tier:
        place = {"": "", "memory": "the hosts' memory", "local": "the hosts' own directory"}[run.tier]
        print(run.continuation.text(run.step, run.config.train.steps, place))
    if run.step < run.config.train.steps:
        print("compiling the step", flush=True)

"""A run from its configuration to its summary, once JAX may be imported."""

from functools import partial

import jax

from jaxtron.models.decoder.attention_choice import attention_lines
from jaxtron.run.attention import choose_attention
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.start import out_of_memory_as_user_error, start_runtime
from jaxtron.runtime.together import leaving_together
from jaxtron.train.loop import train
from jaxtron.train.setup import open_run
from jaxtron.train.summary import finish

ROOM = "Raise --train.microbatches or --mesh.fsdp, set --model.recompute full, or choose a smaller model"


def run(config: Configuration, name: str) -> int:
    """Trains to the last step; 130 if a signal ended the run early, with a checkpoint. `name` names its directory."""
    start_runtime(config.runtime, devices=config.devices)
    room = partial(out_of_memory_as_user_error, ROOM)
    # an error is told before the run is closed, which may need the others
    with leaving_together(), room(), open_run(config, name) as run, leaving_together(), room():
        if jax.process_index() == 0:
            announce(run)
        outcome = train(run)
        if outcome.stopped:
            if jax.process_index() == 0:
                last = outcome.step == config.train.steps
                then = "the last, which is saved" if last else "the same command continues from its checkpoint"
                print(f"stopped after step {outcome.step}{',' if last else ';'} {then}")
            return 130
        finish(run, outcome)
    return 0


def announce(run) -> None:
    """One line of what is about to run, and one if it continues."""
    sizes = run.trainer.blueprint.num_parameters
    mesh = " x ".join(f"{axis} {size}" for axis, size in run.placement.sharding.mesh.shape.items() if size > 1)
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    print(f"{sizes:,} parameters on {devices}{f' ({mesh})' if mesh else ''}, run in {run.directory}")
    kind, parts = jax.devices()[0].device_kind, run.placement.sharding.mesh.shape["context"]
    for line in attention_lines(run.config.model, choose_attention(run.config, parts, kind), kind):
        print(line)
    for line in run.data.notes:
        print(line)
    optimizer, steps = run.config.optimizer, run.config.train.steps
    if optimizer.warmup_steps >= steps:
        print(
            f"optimizer.warmup_steps {optimizer.warmup_steps:,} is not below train.steps {steps:,}: the learning rate "
            f"does not reach {optimizer.learning_rate:g}"
        )
    if run.step:
        print(run.continuation.text(run.step, run.config.train.steps))
    if run.step < run.config.train.steps:
        print("compiling the step", flush=True)

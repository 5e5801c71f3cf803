"""What a device holds all through a step: the working parameters and the executor's buffers, by their types."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.pipeline import executor
from jaxtron.pipeline.layer_loop import StackBuffers
from jaxtron.pipeline.model import Parameters
from jaxtron.pipeline.partition import Partition
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.run.step import Trainer, batch_spec
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.typing import Array, PyTree


def resident(trainer: Trainer, batch: Any, table: Schedule | None = None) -> tuple[Parameters, executor.ExecutorState]:
    """Types of both for an (abstract) batch, run by a table (none: the trainer's schedule).

    Traced, never run. Their shapes are whole along `tensor`, as their shardings say.
    """
    found: list[tuple[Parameters, executor.ExecutorState]] = []

    def local(params: PyTree, batch: Any) -> Array:
        microbatches, (trained, others) = trainer.microbatches(batch), trainer.trained_and_others(params)
        schedule = table or trainer.schedule(microbatches.rows.shape[0])
        model = trainer.program.model(trainer.joined, jax.random.key(0))
        held = executor.initial_state(schedule, trainer.stages, model, trained, microbatches, others)
        # types of arrays in the region name axes that no type outside of it can
        found.append(jax.tree.map(jax.typeof, (trainer.working(params), held)))
        return jnp.zeros(())

    specs = (manual_specs(trainer.blueprint.parameters), batch_spec())
    jax.eval_shape(region(local, specs, PartitionSpec()), trainer.blueprint.abstract, batch)
    return found[0]


def kept_of(stack: Partition, held: StackBuffers) -> list[tuple[PyTree, PyTree]]:
    """Residuals and what is deferred of layers that are alike."""
    return [(held.residuals[kind], held.deferred[kind]) for kind in stack.by_kind] or [(held.residuals, held.deferred)]

"""What fills a GPU's memory in a compiled step, by what it is for."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxtron.gpus import Gpu
from jaxtron.pipeline.layer_loop import StackBuffers
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.figures import figures, flight
from jaxtron.plan.compiled import deviceless
from jaxtron.plan.memory_use import NCCL_BUFFERS, MemoryUse, StageActivations, device_bytes, reserved
from jaxtron.plan.resident import kept_of, resident
from jaxtron.run.step import Trainer
from jaxtron.typing import PyTree


def memory_use(trainer: Trainer, batch: Any, compiled: deviceless.Memory, gpu: Gpu, num_groups: int) -> MemoryUse:
    """Bytes a GPU by class of a compiled step, inside `sharding.use(rules)`; `num_groups` sets of GPUs communicate."""
    state = trainer.abstract_state()
    working, buffers = resident(trainer, batch)
    master, frozen = _at_rest(state.params), _at_rest((state.frozen, state.buffers))
    optimizer = _at_rest((state.optimizer, state.step, state.updates, state.loss_scale, state.health))
    kept = _in_region([(held.residuals, held.deferred) for held in buffers.stacks])
    messages = _in_region((buffers.inputs, buffers.cotangents, buffers.sent))
    weights = _copies(state.model, trainer.parts.join(working))
    gradients = _in_region(([held.grad_accumulators for held in buffers.stacks], buffers.outer_accumulators))
    inputs = compiled.arguments - master - optimizer - frozen
    communication = NCCL_BUFFERS * num_groups
    return MemoryUse(
        master_weights=master,
        optimizer=optimizer,
        frozen=frozen,
        weights=weights,
        gradients=gradients,
        activations=kept,
        messages=messages,
        batch=inputs,
        temporaries=compiled.peak - compiled.arguments - weights - gradients - kept - messages,
        communication=communication,
        reserve=reserved(gpu, communication),
        capacity=gpu.memory_bytes,
        stages=_stages(trainer, buffers.stacks),
    )


class _Left(NamedTuple):
    """Layers of a chunk that are alike: how many by stage, and bytes that one leaves of a microbatch."""

    lengths: Sequence[int]
    residuals: int
    deferred: int


def _stages(trainer: Trainer, held: Sequence[StackBuffers]) -> tuple[StageActivations, ...]:
    """What of the activations' room each stage fills at most, by how many layers of each kind its chunks have."""
    table, stages = trainer.schedule(trainer.config.microbatches), trainer.stages
    lowered = lower(table, stages.stack_chunks)
    # by chunk
    left: list[list[_Left]] = []
    for stack, buffers, *slots in zip(
        stages.partitions, held, lowered.num_residuals, lowered.num_deferred, strict=True
    ):
        for chunk in range(stack.num_chunks):
            left.append([])
            for part, kept in zip(stack.alike, kept_of(stack, buffers), strict=True):
                lengths = [lengths[chunk] for lengths in part.chunk_lengths]
                each = [count * part.slots_per_chunk for count in slots]
                sizes = [_in_region(leaves) // max(1, number) for leaves, number in zip(kept, each, strict=True)]
                left[-1].append(_Left(lengths, *sizes))
    found = []
    for stage, figure in enumerate(figures(table).stages):
        residuals = [sum(one.lengths[stage] * one.residuals for one in alike) for alike in left]
        deferred = [sum(one.lengths[stage] * one.deferred for one in alike) for alike in left]
        layers = sum(sum(stack.chunk_lengths[stage]) for stack in stages.partitions)
        # residuals stay until the weight gradients
        ticks = zip(flight(table, stage, residuals), flight(table, stage, deferred), strict=True)
        most = max(kept.held + late.deferred for kept, late in ticks)
        found.append(StageActivations(layers, figure.held, most))
    return tuple(found)


def _at_rest(state: PyTree) -> int:
    """Bytes of a device's part of global arrays."""
    total = 0
    for leaf in jax.tree.leaves(state):
        # counters have no sharding: every device has them whole
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _in_region(types: PyTree) -> int:
    """Bytes of a device's part of arrays inside the manual region."""
    return sum(map(device_bytes, jax.tree.leaves(types)))


def _copies(params: PyTree, working: PyTree) -> int:
    """Bytes of the working parameters that are not read as they lie at rest."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(working), strict=True)
    return sum(
        _in_region(used) for rest, used in pairs if (rest.dtype, _at_rest(rest)) != (used.dtype, _in_region(used))
    )

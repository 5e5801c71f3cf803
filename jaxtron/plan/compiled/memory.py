"""What fills a GPU's memory in a step, by what it is for."""

import math
from dataclasses import dataclass

import jax

from jaxtron.gpus import Gpu
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.figures import figures
from jaxtron.plan.compiled import deviceless
from jaxtron.plan.compiled.activations import device_bytes
from jaxtron.run.step import Batch, Trainer
from jaxtron.typing import PyTree

GIB = 2**30
# Estimates, not of the program: what the driver and libraries take once a process (CUDA's context, loaded kernels,
# cuBLAS's workspaces), and NCCL's buffers and proxies for each set of devices that communicates. Both are beside JAX's
# pool, and what they leave of the memory beside it is of no use to the program.
RESERVE = round(1.5 * GIB)
NCCL_BUFFERS = round(0.25 * GIB)


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline: layers, most microbatches of a chunk that it holds, and the bytes they fill."""

    layers: int
    held: int
    bytes: int


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one GPU, the same on all: one program runs everywhere, with room for the fullest stage.

    `temporaries` is what the compiled program needs beside the classes that its shapes explain, `reserve` what is left
    for others beside JAX's pool, so that a program that fits the GPU fits the pool.
    """

    master_weights: int
    optimizer: int
    weights: int
    gradients: int
    activations: int
    messages: int
    batch: int
    temporaries: int
    communication: int
    reserve: int
    capacity: int
    stages: tuple[Stage, ...]

    @property
    def classes(self) -> dict[str, int]:
        """Bytes by class, in the order of a report."""
        return {
            "master weights": self.master_weights,
            "optimizer": self.optimizer,
            "weights": self.weights,
            "gradients": self.gradients,
            "activations in flight": self.activations,
            "pipeline messages": self.messages,
            "batch": self.batch,
            "temporaries": self.temporaries,
            "communication buffers": self.communication,
            "reserve": self.reserve,
        }

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.classes.values())

    @property
    def program(self) -> int:
        """What the compiled program needs, without estimates."""
        return self.total - self.communication - self.reserve

    @property
    def fits(self) -> bool:
        """Whether the GPU has so much."""
        return self.total <= self.capacity


def reserved(gpu: Gpu, communication: int) -> int:
    """Bytes of a GPU that neither JAX's pool nor `communication` may fill; at least what driver and libraries take."""
    return max(RESERVE, gpu.memory_bytes - gpu.pool_bytes - communication)


def memory_use(trainer: Trainer, batch: Batch, compiled: deviceless.Memory, gpu: Gpu, num_groups: int) -> MemoryUse:
    """Bytes a GPU by class of a compiled step, inside `sharding.use(rules)`; `num_groups` sets of GPUs communicate."""
    state = trainer.abstract_state()
    working, buffers = trainer.held(batch)
    master, optimizer = _at_rest(state.params), _at_rest((state.optimizer, state.step, state.loss_scale))
    kept = _in_region((buffers.residuals, buffers.pairs))
    messages = _in_region((buffers.activations, buffers.gradients, buffers.sent))
    weights = _copies(state.params, working)
    gradients = _in_region(buffers.sums)
    inputs = compiled.arguments - master - optimizer
    communication = NCCL_BUFFERS * num_groups
    return MemoryUse(
        master_weights=master,
        optimizer=optimizer,
        weights=weights,
        gradients=gradients,
        activations=kept,
        messages=messages,
        batch=inputs,
        temporaries=compiled.peak - compiled.arguments - weights - gradients - kept - messages,
        communication=communication,
        reserve=reserved(gpu, communication),
        capacity=gpu.memory_bytes,
        stages=_stages(trainer, kept),
    )


def _stages(trainer: Trainer, kept: int) -> tuple[Stage, ...]:
    """What of the activations' room each stage fills at most."""
    table = trainer.schedule(trainer.config.microbatches)
    program, partition = lower(table), trainer.partition
    slots = (program.num_residuals + program.num_pairs) * partition.chunk_rows
    layers = [sum(chunks) for chunks in partition.chunk_lengths]
    held = [stage.held for stage in figures(table).stages]
    return tuple(
        Stage(count, most, min(kept, kept * most * count // (partition.num_chunks * slots)))
        for count, most in zip(layers, held, strict=True)
    )


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

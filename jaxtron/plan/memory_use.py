"""What fills a GPU's memory in a step, by what it is for: of a compiled program or by formula."""

from dataclasses import dataclass
from typing import Any

from jaxtron.gpus import Gpu
from jaxtron.sharding.layout import spec_axes
from jaxtron.sharding.rules import current

GIB = 2**30
# Estimates, not of the program: what the driver and libraries take once a process (CUDA's context, loaded kernels,
# cuBLAS's workspaces), and NCCL's buffers and proxies for each set of devices that communicates. Both are beside JAX's
# pool, and what they leave of the memory beside it is of no use to the program.
RESERVE = round(1.5 * GIB)
NCCL_BUFFERS = round(0.25 * GIB)


@dataclass(frozen=True)
class StageActivations:
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
    frozen: int
    weights: int
    gradients: int
    activations: int
    messages: int
    batch: int
    temporaries: int
    communication: int
    reserve: int
    capacity: int
    stages: tuple[StageActivations, ...]

    @property
    def classes(self) -> dict[str, int]:
        """Bytes by class, in the order of a report."""
        return {
            "master weights": self.master_weights,
            "optimizer": self.optimizer,
            "frozen weights, buffers": self.frozen,
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


def device_bytes(abstract: Any) -> int:
    """Those of a device's part of an array inside the manual region, which its sharding splits along `tensor` alone."""
    axes = sum(spec_axes(abstract.sharding.spec), ())
    return abstract.size * abstract.dtype.itemsize // current().size(axes)

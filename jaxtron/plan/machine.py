"""How long a GPU and its links take for one operation: a roofline whose constants are data.

Sizes are bytes and floating-point operations (FLOPs), times are seconds.
"""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from jaxtron.config import Config, UserError, load
from jaxtron.gpus import GPUS, Gpu, gpu_named, has_fp8
from jaxtron.models.work.operations import CollectiveKind, FusedKernel, Product
from jaxtron.sharding.folding import Axes

CONSTANTS = Path(__file__).with_name("machines.yaml")


@dataclass(frozen=True)
class Group:
    """Devices that communicate: `size` of them, `local` of which share a node (with NVLink between them)."""

    size: int
    local: int


class Machine(Config):
    """A GPU with its links, and what part of the datasheet's figures (`jaxtron/gpus.py`) a training gets of them."""

    gpu: str
    """Its name, one of those in jaxtron/gpus.py."""
    product_fraction: float = Field(gt=0, le=1)
    """Of the peak FLOP/s, in a product so large that its bytes do not count."""
    attention_fraction: float = Field(gt=0, le=1)
    """Of the peak FLOP/s, in a fused attention kernel."""
    memory_fraction: float = Field(gt=0, le=1)
    """Of the memory bandwidth, in a pass over large arrays."""
    nvlink_fraction: float = Field(gt=0, le=1)
    """Of the NVLink bandwidth of one direction."""
    network_fraction: float = Field(gt=0, le=1)
    """Of the network bandwidth of a GPU."""
    exchange_fraction: float = Field(default=0.6, gt=0, le=1)
    """Of either bandwidth, in an all-to-all."""
    kernel_seconds: float = Field(ge=0)
    """Of every kernel beyond its work: launch, ramp and tail."""
    nvlink_seconds: float = Field(ge=0)
    """Latency of a step of a collective inside a node."""
    network_seconds: float = Field(ge=0)
    """Latency of a step between nodes."""

    product_ceiling: float = Field(default=0.75, gt=0, le=1)
    """Of the peak FLOP/s, in the best products known of the GPU; like the next two for the bound of a compiled step."""
    attention_ceiling: float = Field(default=0.5, gt=0, le=1)
    """Of the peak FLOP/s, in a fused kernel at its best."""
    memory_ceiling: float = Field(default=0.85, gt=0, le=1)
    """Of the memory bandwidth, in a copy at its best."""

    @model_validator(mode="after")
    def _check(self) -> "Machine":
        gpu_named(self.gpu)
        return self

    @property
    def datasheet(self) -> Gpu:
        """The GPU's sizes and peaks."""
        return gpu_named(self.gpu)

    def product_seconds(self, product: Product) -> float:
        """Seconds of matrix products: their FLOPs, then their bytes, then a launch.

        Bytes are added and not hidden: the first tiles wait for operands and the last ones for their writes. So the
        part of the peak that is reached falls with the size, and with a short contraction. float32 is computed as
        TF32, at half the peak, and 8-bit numbers at twice the peak, where the GPU multiplies them.
        """
        gpu = self.datasheet
        faster = 2.0 if has_fp8(gpu.device_kind) else 1.0
        rate = self.product_fraction * gpu.peak_flops * min(faster, 2.0 / product.width)
        moved = product.bytes / (self.memory_fraction * gpu.memory_bandwidth)
        return product.flops / rate + moved + self.kernel_seconds

    def fused_seconds(self, kernel: FusedKernel) -> float:
        """Seconds of a fused kernel: of its FLOPs at the rate of attention, or of its bytes if longer, and a launch."""
        gpu = self.datasheet
        multiplied = kernel.flops / (self.attention_fraction * gpu.peak_flops)
        return max(multiplied, kernel.bytes / (self.memory_fraction * gpu.memory_bandwidth)) + self.kernel_seconds

    def pass_seconds(self, size: float, kernels: int = 1) -> float:
        """Seconds in which `size` bytes are read or written by so many kernels."""
        return size / (self.memory_fraction * self.datasheet.memory_bandwidth) + kernels * self.kernel_seconds

    def least_seconds(self, flops: float, size: float, *, width: float = 2.0, is_fused: bool = False) -> float:
        """The least that a kernel takes: its FLOPs or its bytes at the ceilings, whichever takes longer; no launch.

        `width` are the bytes of a number that is multiplied: those of 4 at half the peak, those of 1 at twice it.
        """
        gpu = self.datasheet
        ceiling = self.attention_ceiling if is_fused else self.product_ceiling
        moved = size / (self.memory_ceiling * gpu.memory_bandwidth)
        return max(flops / (ceiling * gpu.peak_flops * 2.0 / width), moved)

    def collective_seconds(self, kind: CollectiveKind, size: float, group: Group) -> float:
        """Seconds of a collective; `size` is the bytes of the whole array: gathered, or before it is scattered.

        A ring inside a node moves size * (n - 1) / n bytes through each GPU's NVLink. Between nodes each of the
        node's GPUs uses its own network card for its share. An all-reduce is a reduce-scatter and an all-gather. In an
        all-to-all each device sends an equal part of `size` to each, by its own card to those in other nodes.
        """
        if group.size == 1:
            return 0.0
        gpu, nodes = self.datasheet, group.size // group.local
        nvlink, network = self.nvlink_fraction * gpu.nvlink_bandwidth, self.network_fraction * gpu.network_bandwidth
        if kind == "all_to_all":
            # nobody passes on what is another's
            nvlink, network = (self.exchange_fraction * rate for rate in (gpu.nvlink_bandwidth, gpu.network_bandwidth))
            inside = size * (group.local - 1) / group.size / nvlink
            between = size * (nodes - 1) / nodes / network
        else:
            inside = size * (group.size - 1) / group.size / nvlink
            between = size * (nodes - 1) / nodes / (group.local * network)
        latency = (group.local - 1) * self.nvlink_seconds + math.log2(nodes) * self.network_seconds
        once = max(inside if group.local > 1 else 0.0, between) + latency
        return 2 * once if kind == "all_reduce" else once

    def message_seconds(self, size: float, *, inside_node: bool) -> float:
        """Seconds of `size` bytes from one GPU to another."""
        if inside_node:
            return size / (self.nvlink_fraction * self.datasheet.nvlink_bandwidth) + self.nvlink_seconds
        return size / (self.network_fraction * self.datasheet.network_bandwidth) + self.network_seconds


def axes_group(sizes: Mapping[str, int], axes: Axes, gpus_per_node: int) -> Group:
    """The devices along some axes of a mesh with these sizes, outermost first, whose devices fill nodes in order."""
    size = local = stride = 1
    for axis, parts in reversed(list(sizes.items())):
        if axis in axes:
            size *= parts
            local *= min(parts, max(1, gpus_per_node // stride))
        stride *= parts
    while size % local:
        local -= 1
    return Group(size, local)


class Machines(Config):
    """The constants of every GPU that Jaxtron knows by name."""

    a100: Machine
    h100: Machine
    h200: Machine
    b200: Machine
    gb200: Machine


@functools.cache
def machine_named(name: str) -> Machine:
    """The machine of a known GPU, or of a target's file, with the constants of machines.yaml; `UserError` for others.

    A GPU from a file has those of the first known one of its architecture.
    """
    gpu, machines = gpu_named(name), load(Machines, CONSTANTS, None)
    if gpu.name in GPUS:
        return getattr(machines, gpu.name)
    major = gpu.compute_capability.partition(".")[0]
    kin = next(known for known in GPUS.values() if known.compute_capability.partition(".")[0] == major)
    return getattr(machines, kin.name).model_copy(update={"gpu": name})


def read_machine(path: Path) -> Machine:
    """The machine of a YAML file with `Machine`'s fields, as `calibrate` writes it; `UserError` if it does not read."""
    if not os.path.isfile(path):
        raise UserError(f"machine file {path} does not exist; names of GPUs are {', '.join(GPUS)}")
    return load(Machine, path, None)

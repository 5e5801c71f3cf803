"""What a layer keeps for its backward, in bytes, from shapes alone."""

import math
from dataclasses import replace
from typing import NamedTuple

import jax

from jaxtron.config import UserError
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work
from jaxtron.plan.memory_use import device_bytes
from jaxtron.plan.resident import kept_of, resident
from jaxtron.run.attention import select_attention
from jaxtron.run.batches import abstract_batch
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_trainer
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import current, make_rules, use
from jaxtron.typing import PyTree


class Kept(NamedTuple):
    """Bytes a device keeps of them in one period: for backwards, and for weight gradients that were put off."""

    residuals: int
    deferred: int


class RowBytes(NamedTuple):
    """Bytes of so many rows on a device: what is kept in a layer of each stack (or kind), and the stream between."""

    kept: tuple[Kept, ...]
    stream: int


def layer_bytes(config: Configuration, sizes: dict[str, int], kind: str | None = None) -> tuple[int, ...]:
    """Bytes that a device keeps of one microbatch in one layer (a period of a pattern) of each stack, or each kind.

    `kind` is what the devices are (`jax.Device.device_kind`; none: this machine's): kernels keep no probabilities.
    """
    rows = config.train.global_batch // config.train.microbatches // (sizes["data"] * sizes["fsdp"])
    found = row_bytes(
        config, sizes["tensor"], sizes["context"], kind, rows=rows, expert_tensor=config.mesh.expert_tensor
    )
    return tuple(kept.residuals for kept in found.kept)


def row_bytes(
    config: Configuration,
    tensor: int,
    context: int = 1,
    kind: str | None = None,
    *,
    rows: int = 1,
    expert_tensor: int = 1,
) -> RowBytes:
    """Bytes of so many rows of a microbatch on each of `tensor` x `context` devices.

    Traced, never run, on devices of this machine that stand for those of this `kind`; `UserError` where it has too few.
    Devices with other experts change nothing: what they send is as much as they get.
    """
    # two parts of a sequence stand for any number: nothing that is kept is larger than a part
    parts = min(context, 2) if tensor % expert_tensor == 0 else context
    length = config.data.sequence_length // context * parts
    data = expert_tensor // math.gcd(expert_tensor, tensor * parts)
    count = tensor * parts * data
    if count > len(jax.devices()):
        raise UserError(f"mesh.tensor {tensor} is traced on {count} devices, here are {len(jax.devices())}: --devices")
    sizes = MeshConfig(data=data, context=parts, tensor=tensor, expert_tensor=expert_tensor)
    mesh = build_mesh(sizes, jax.devices()[:count])
    alone = {
        "data": config.data.model_copy(update={"sequence_length": length}),
        "train": config.train.model_copy(update={"global_batch": rows * data, "microbatches": 1, "batch_ramp": None}),
        "pipeline": PipelineConfig(),
    }
    config = config.model_copy(update=alone)
    with use(replace(make_rules(mesh, ShardingConfig()), stands_for=kind)):
        trainer = make_trainer(config, select_attention(config, parts, current().device_kind))
        table = _put_off(trainer.stages.num_chunks)
        held = resident(trainer, abstract_batch(config), table)[1]
        kept = tuple(
            Kept(*(_bytes(arrays) // part.num_layers for arrays in both))
            for buffers, stack in zip(held.stacks, trainer.stages.partitions, strict=True)
            for part, both in zip(stack.alike, kept_of(stack, buffers), strict=True)
        )
        cotangents = lower(table, trainer.stages.stack_chunks).num_cotangents + 1
        return RowBytes(kept, _bytes(held.cotangents) // cotangents)


def _put_off(num_chunks: int) -> Schedule:
    """One microbatch through the chunks of one stage, weight gradients apart."""
    works = [Work(chunk, 0) for chunk in range(num_chunks)]
    there = [(Entry(forward=work),) for work in works]
    return Schedule("put off", (*there, *((Entry(backward=work, weight=work),) for work in works[::-1])), 1, num_chunks)


def _bytes(arrays: PyTree) -> int:
    return sum(map(device_bytes, jax.tree.leaves(arrays)))

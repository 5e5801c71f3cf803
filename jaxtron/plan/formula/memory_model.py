"""What fills a GPU's memory in a step, by formula: the classes of `memory.MemoryUse` without compiling anything."""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp

from jaxtron.gpus import Gpu
from jaxtron.layers.loss import GPU_CHUNK_ELEMENTS
from jaxtron.models.work.profile import JAXTRON
from jaxtron.models.work.shapes import FLOAT
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.plan.formula.activations import Kept, RowBytes, row_bytes
from jaxtron.plan.formula.parameters import Parameter, abstract_rules, parameters_of
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.memory_use import NCCL_BUFFERS, MemoryUse, reserved
from jaxtron.run.attention import select_attention
from jaxtron.run.batches import batch_row_bytes
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.parameters import working_dtype
from jaxtron.sharding.rules import Rules

COUNTER = 4
# What compiled steps hold at their peak beside the classes that shapes explain and beside the layers, measured as in
# models/work/blocks.py: multiples of a chunk's logits and of the head's table in float32.
LOGITS, TABLES = 1.5, 1.2


class BufferSlots(NamedTuple):
    """How many of each buffer's slots a schedule needs."""

    residuals: tuple[int, ...]
    """Of each stack, or of each kind of its layers."""
    deferred: tuple[int, ...]
    activations: int
    gradients: int


class StateBytes(NamedTuple):
    """Bytes of a device, of all arrays or one: trained at rest in float32, moments of the optimizer, what is not
    trained at rest, the copy to compute with, gradients' sums; `largest` is the sum of the largest array, `arriving`
    the largest of the copy that is gathered once a step, and `gathered` whether any is gathered at use."""

    master: int
    optimizer: int
    frozen: int
    weights: int
    gradients: int
    largest: int
    arriving: int
    gathered: bool

    @property
    def total(self) -> int:
        """What the device holds of them."""
        return self.master + self.optimizer + self.frozen + self.weights + self.gradients


class Estimator:
    """Bytes by class for any layout of one model; what must be traced for it is traced once."""

    def __init__(self, config: Configuration) -> None:
        self.config = config.resolved()
        self._parameters = parameters_of(self.config)
        self._chunks: dict[tuple, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._row_bytes: dict[tuple, RowBytes] = {}
        self._states: dict[tuple, StateBytes] = {}

    def memory(self, config: Configuration, sizes: dict[str, int], gpu: Gpu) -> MemoryUse:
        """What `memory.memory_use` finds for the configuration, which may differ from the first in all but the model.

        Exact but for temporaries and the number of sets of GPUs that communicate (so `stages` is left empty). Raises
        `UserError` where a parameter does not divide, or the schedule does not run. Tensor parallelism needs as many
        devices here, simulated ones will do.
        """
        stages, train = sizes["pipe"], config.train
        rows = train.global_batch // train.microbatches // (sizes["data"] * sizes["fsdp"])
        layers, of_stack = self._chunk_layers(config, stages)
        num_stacks = len(set(of_stack))
        slots = _slots(shortened(config, stages), stages, num_stacks)
        slots = slots._replace(
            residuals=tuple(slots.residuals[stack] for stack in of_stack),
            deferred=tuple(slots.deferred[stack] for stack in of_stack),
        )
        state = self.state(config, sizes)
        row = self._kept(config, sizes, rows, gpu.device_kind)
        travels = stages * _chunks(config, stages) * num_stacks > 1
        held = (slots.activations + 1 if travels else 0) + slots.gradients + 1 + travels
        communication = NCCL_BUFFERS * _groups(sizes)
        each = zip(layers, slots.residuals, slots.deferred, row.kept, strict=True)
        kept = sum(count * (here * one.residuals + late * one.deferred) for count, here, late, one in each)
        used = MemoryUse(
            master_weights=state.master,
            optimizer=state.optimizer,
            frozen=state.frozen,
            weights=state.weights,
            gradients=state.gradients,
            activations=kept,
            messages=held * row.stream,
            batch=rows * train.microbatches * batch_row_bytes(config),
            temporaries=0,
            communication=communication,
            reserve=reserved(gpu, communication),
            capacity=gpu.memory_bytes,
            stages=(),
        )
        temporaries = _temporaries(config, sizes, gpu.device_kind, slots, layers, row.kept, state, used)
        return replace(used, temporaries=temporaries)

    def state(self, config: Configuration, sizes: dict[str, int]) -> StateBytes:
        """Of all parameters; a `UserError` where one does not divide, or the layers cannot be shared out."""
        stages = sizes["pipe"]
        rows = tuple(count * _chunks(config, stages) for count in self._chunk_layers(config, stages)[0])
        mesh = config.mesh.model_copy(update=sizes)
        # where they lie changes no bytes
        key = (*(sizes[flag] for flag in FLAGS), mesh.expert, mesh.expert_tensor, config.sharding.zero, rows)
        if key not in self._states:
            self._states[key] = self._added(abstract_rules(mesh, config.sharding), rows)
        return self._states[key]

    def _added(self, rules: Rules, rows: tuple[int, ...]) -> StateBytes:
        """With so many rows of each stack (or kind) on a device."""
        optimizer, dtype = self.config.optimizer, DTYPES[self.config.train.precision]
        counts = [1 if parameter.stack is None else rows[parameter.stack] for parameter in self._parameters]
        each = zip(self._parameters, counts, strict=True)
        found = [_state(parameter, rules, count, dtype) for parameter, count in each]
        moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
        master, _, frozen, weights, gradients, largest, arriving, gathered = zip(*found, strict=True)
        # steps and updates, and adamw counts its updates too
        counters = COUNTER * (2 + (optimizer.name == "adamw"))
        return StateBytes(
            sum(master),
            moments * sum(master) + counters,
            sum(frozen),
            sum(weights),
            sum(gradients),
            max(largest),
            max(arriving),
            any(gathered),
        )

    def _chunk_layers(self, config: Configuration, num_stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Slots of a chunk for layers that are alike, and the numbers of their stacks."""
        key = (num_stages, config.pipeline)
        if key not in self._chunks:
            plan = shortened(config, num_stages).stage_plan(num_stages)
            numbers, parts = zip(*plan.alike, strict=True)
            self._chunks[key] = tuple(part.slots_per_chunk for part in parts), numbers
        return self._chunks[key]

    def _kept(self, config: Configuration, sizes: dict[str, int], rows: int, kind: str) -> RowBytes:
        """Of so many rows. All that is kept has a device's tokens and no more, so that a row tells what is kept of
        several, and a whole sequence what is kept of a part, where the same implementation computes its attention.

        But experts have as many rows as a device's tokens need, rounded up."""

        def names(parts: int) -> tuple[str, ...]:
            return tuple(backend.name for backend in select_attention(config, parts, kind).values())

        tensor, context = sizes["tensor"], sizes["context"]
        parts = 1 if names(1) == names(context) else 2
        traced, width = 1, config.mesh.expert_tensor
        if config.family.experts(config.model) is not None:
            parts, traced = context, rows
        key = (getattr(config.model, "recompute", None), tensor, parts, names(context), kind, traced, width)
        if key not in self._row_bytes:
            self._row_bytes[key] = row_bytes(config, tensor, parts, kind, rows=traced, expert_tensor=width)
        found = self._row_bytes[key]

        def whole(size: int) -> int:
            return size * parts // context * rows // traced

        more = self._more_kept(config, sizes, kind, found.kept)
        kept = (
            Kept(whole(one.residuals) + here, whole(one.deferred)) for one, here in zip(found.kept, more, strict=True)
        )
        return RowBytes(tuple(kept), whole(found.stream))

    def _more_kept(
        self, config: Configuration, sizes: dict[str, int], kind: str, kept: tuple[Kept, ...]
    ) -> tuple[int, ...]:
        """Bytes of a layer of each stack (or kind) beside those of a trace, where no devices share experts."""
        if config.family.experts(config.model) is None:
            return (0,) * len(kept)
        shapes = shapes_of(config, sizes, JAXTRON, kind)
        alone = replace(shapes, sizes=shapes.sizes | {"expert": 1})
        both = zip(*(work_of(config, one).stacks for one in (shapes, alone)), strict=True)
        return tuple(round(here.expert_kept - there.expert_kept) for here, there in both)


def _temporaries(
    config: Configuration,
    sizes: dict[str, int],
    kind: str,
    slots: BufferSlots,
    layers: tuple[int, ...],
    kept: tuple[Kept, ...],
    state: StateBytes,
    used: MemoryUse,
) -> int:
    """An estimate, for the rest is exact: the most of a layer's backward, the head, and the step's two ends.

    On one stage the loop over layers has its own copy of what it reads transposed: products for weight gradients
    contract tokens. Gathered at use, the largest array's gradients are transposed once more. With stages, the
    reductions of the step's end run at the same time, each with a transposed copy; without, one after the other. At its
    beginning weights that are gathered once arrive with one device's part after the other's, and array by array a copy
    puts them in order: the largest is there twice, with room for all that is kept beside it, and for gradients' sums
    where there are several microbatches or stages.
    """
    shapes = shapes_of(config, sizes, JAXTRON, kind)
    work = work_of(config, shapes)
    tables = TABLES * FLOAT * work.head_matrix
    head = tables + LOGITS * FLOAT * min(work.logits, GPU_CHUNK_ELEMENTS)
    loop = max(*(stack.temporaries for stack in work.stacks), head)
    for count, here, stack in zip(layers, slots.residuals, work.stacks, strict=True):
        # what a pipeline keeps is read as it lies
        in_loop = stack.transposed_in_loop if count > 1 else stack.transposed
        loop += count * here * shapes.rows * (in_loop if sizes["pipe"] == 1 else 0)
    if config.pipeline.overlap and sizes["pipe"] > 1:
        # a layer's residuals are read ahead, and a forward makes its own meanwhile
        each = zip(kept, work.stacks, strict=True)
        loop += max(2 * one.residuals + stack.beside for one, stack in each)
    if state.gathered:
        loop += state.largest + tables
    has_experts = any(stack.expert_parameters for stack in work.stacks)
    copies = max(sizes["data"] * sizes["context"], shapes.sizes["expert_data"] if has_experts else 1)
    if config.sharding.zero != "optimizer" or copies == 1:
        return round(loop)
    has_sums = sizes["pipe"] > 1 or config.train.microbatches > 1
    loop = max(loop, state.arriving - (0 if has_sums else used.gradients))
    reduced = state.master + (state.gradients if sizes["pipe"] > 1 else state.largest)
    return round(max(loop, reduced - used.weights - used.activations - used.messages))


def _groups(sizes: dict[str, int]) -> int:
    """Sets of GPUs that communicate: along every choice of the axes there are."""
    return 2 ** sum(part > 1 for part in sizes.values()) - 1


def _state(parameter: Parameter, rules: Rules, count: int, dtype: jnp.dtype) -> StateBytes:
    """One parameter on a device, `count` rows of it; as `parameters.gather_once` makes the copy to compute with."""
    is_trained = parameter.status == "trained"
    layout = rules.parameter_layout(
        parameter.axes, parameter.shape, is_trained=is_trained, is_outer=parameter.stack is None
    )
    at_rest, whole = (count * math.prod(rules.part(layout, gathers)) for gathers in ((), layout.once))
    later = layout.at_use != ()
    if not is_trained:
        # used as it lies at rest
        return StateBytes(0, 0, working_dtype(parameter.role, dtype).itemsize * at_rest, 0, 0, 0, 0, later)
    width = FLOAT if later else working_dtype(parameter.role, dtype).itemsize
    copy = width * whole * ((width, whole) != (FLOAT, at_rest))
    return StateBytes(FLOAT * at_rest, 0, 0, copy, FLOAT * whole, FLOAT * whole, copy * (whole > at_rest), later)


def shortened(config: Configuration, num_stages: int) -> Configuration:
    """The configuration with fewer microbatches whose schedule needs as many slots: pipelines repeat themselves.

    Two to three for each stage show all that a longer schedule holds, if the rest is the same; but gpipe holds them
    all, and interleaved with a rest has other groups.
    """
    count, name = config.train.microbatches, config.pipeline.schedule
    short = 2 * num_stages + count % num_stages
    keeps = name == "gpipe" or name.endswith(".csv") or (name == "interleaved" and count % num_stages)
    if num_stages == 1:
        short = 1
    elif keeps or count < short:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"microbatches": short})})


def _chunks(config: Configuration, num_stages: int) -> int:
    """A stage's chunks of each stack."""
    return config.pipeline.chunks if num_stages > 1 else 1


def _slots(config: Configuration, num_stages: int, num_stacks: int) -> BufferSlots:
    pipeline, count, chunks = config.pipeline, config.train.microbatches, _chunks(config, num_stages)
    if pipeline.schedule.endswith(".csv"):
        return _buffer_slots(config.schedule(num_stages), chunks, num_stacks)
    return _made_slots(pipeline.schedule, num_stages, count, chunks, num_stacks)


@functools.lru_cache(maxsize=4096)
def _made_slots(name: str, num_stages: int, num_microbatches: int, chunks: int, num_stacks: int) -> BufferSlots:
    table = make_schedule(name, num_stages, num_microbatches, chunks, num_stacks)
    return _buffer_slots(table, chunks, num_stacks)


def _buffer_slots(table: Schedule, chunks: int, num_stacks: int) -> BufferSlots:
    lowered = lower(table, (chunks,) * num_stacks)
    return BufferSlots(lowered.num_residuals, lowered.num_deferred, lowered.num_inputs, lowered.num_cotangents)

"""What fills a GPU's memory in a step, by formula: the classes of `memory.MemoryUse` without compiling anything."""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.data.batch import SEQUENCE, TokenBatch, row_bytes
from jaxtron.gpus import Gpu
from jaxtron.layers.loss import CHUNK_ELEMENTS
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.models.program import make_parts
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.plan.formula.activations import Kept, kept_bytes
from jaxtron.plan.formula.layer_work import LAYER_WORK
from jaxtron.plan.formula.workload import FLOAT, Shapes, shapes_of
from jaxtron.plan.memory_use import NCCL_BUFFERS, MemoryUse, reserved
from jaxtron.plan.profile import JAXTRON
from jaxtron.roles import Role
from jaxtron.run.attention import select_attention
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.mesh import abstract_mesh, build_mesh
from jaxtron.sharding.parameters import working_dtype
from jaxtron.sharding.rules import Rules, make_rules, use

COUNTER = 4
# What compiled steps hold at their peak beside the classes that shapes explain and beside the layers, measured as in
# layer_work.py: multiples of a chunk's logits and of the head's table in float32.
LOGITS, TABLES = 3.0, 2.5
# What is deferred to weight gradients is copied, and their operands transposed.
DEFERRED = 1.2


class BufferSlots(NamedTuple):
    """How many of each buffer's slots a schedule needs."""

    residuals: int
    deferred: int
    activations: int
    gradients: int


@dataclass(frozen=True)
class Parameter:
    """An array of the model's, whole; of stacked ones `shape` is a row's, without the leading axis."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role
    is_stacked: bool


class StateBytes(NamedTuple):
    """Bytes of a device, of all arrays or one: at rest in float32, moments of the optimizer, the copy to compute with,
    gradients' sums; `largest` is the sum of the largest array, and `gathered` whether any is gathered at use."""

    master: int
    optimizer: int
    weights: int
    gradients: int
    largest: int
    gathered: bool

    @property
    def total(self) -> int:
        """What the device holds of them."""
        return self.master + self.optimizer + self.weights + self.gradients


class Estimator:
    """Bytes by class for any layout of one model; what must be traced for it is traced once."""

    def __init__(self, config: Configuration) -> None:
        self.config = config.resolved()
        self._parameters = _parameters(self.config)
        self._rows: dict[tuple, int] = {}
        self._kept: dict[tuple, Kept] = {}
        self._states: dict[tuple, StateBytes] = {}

    def memory(self, config: Configuration, sizes: dict[str, int], gpu: Gpu) -> MemoryUse:
        """What `memory.memory_use` finds for the configuration, which may differ from the first in all but the model.

        Exact but for temporaries and the number of sets of GPUs that communicate (so `stages` is left empty). Raises
        `UserError` where a parameter does not divide, or the schedule does not run. Tensor parallelism needs as many
        devices here, simulated ones will do.
        """
        stages, tensor = sizes["pipe"], sizes["tensor"]
        model, train = config.model, config.train
        rows = train.global_batch // train.microbatches // (sizes["data"] * sizes["fsdp"])
        slots = _slots(shortened(config, stages), stages)
        chunk_rows, chunks = self._chunk_rows(config, stages), config.pipeline.chunks if stages > 1 else 1
        state = self.state(config, sizes)
        kept = self._kept_bytes(config, tensor, sizes["context"], gpu.device_kind)
        width = DTYPES[train.precision].itemsize
        x = rows * config.data.sequence_length * model.hidden_size * width // (tensor * sizes["context"])
        travels = stages * chunks > 1
        held = (slots.activations + 1 if travels else 0) + slots.gradients + 1 + travels
        communication = NCCL_BUFFERS * _groups(sizes)
        row = row_bytes(TokenBatch, {SEQUENCE: config.data.sequence_length}, config.data.optional_fields)
        used = MemoryUse(
            master_weights=state.master,
            optimizer=state.optimizer,
            weights=state.weights,
            gradients=state.gradients,
            activations=rows * chunk_rows * (slots.residuals * kept.residuals + slots.deferred * kept.deferred),
            messages=held * x,
            batch=rows * train.microbatches * row,
            temporaries=0,
            communication=communication,
            reserve=reserved(gpu, communication),
            capacity=gpu.memory_bytes,
            stages=(),
        )
        temporaries = _temporaries(config, sizes, gpu.device_kind, slots, chunk_rows, kept, state, used)
        return replace(used, temporaries=temporaries)

    def state(self, config: Configuration, sizes: dict[str, int]) -> StateBytes:
        """Of all parameters; a `UserError` where one does not divide, or the layers cannot be shared out."""
        stages = sizes["pipe"]
        rows = self._chunk_rows(config, stages) * (config.pipeline.chunks if stages > 1 else 1)
        key = (*(sizes[axis] for axis in FLAGS), config.sharding.zero, rows)
        if key not in self._states:
            self._states[key] = self._added(_rules(sizes, config.sharding), rows)
        return self._states[key]

    def _added(self, rules: Rules, rows: int) -> StateBytes:
        optimizer, dtype = self.config.optimizer, DTYPES[self.config.train.precision]
        found = [_state(parameter, rules, rows, dtype) for parameter in self._parameters]
        moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
        master, _, weights, gradients, largest, gathered = zip(*found, strict=True)
        # adamw counts its updates, and so does the learning rate, beside the step
        counts = COUNTER * (2 + (optimizer.name == "adamw"))
        return StateBytes(
            sum(master), moments * sum(master) + counts, sum(weights), sum(gradients), max(largest), any(gathered)
        )

    def _chunk_rows(self, config: Configuration, num_stages: int) -> int:
        key = (num_stages, config.pipeline)
        if key not in self._rows:
            self._rows[key] = shortened(config, num_stages).stage_plan(num_stages).partitions[0].slots_per_chunk
        return self._rows[key]

    def _kept_bytes(self, config: Configuration, tensor: int, context: int, kind: str) -> Kept:
        """Of one row. All that is kept has a device's tokens and no more, so that a whole sequence tells what is kept
        of a part, where the same implementation computes its attention."""

        def names(parts: int) -> tuple[str, ...]:
            return tuple(backend.name for backend in select_attention(config, parts, kind).values())

        parts = 1 if names(1) == names(context) else 2
        key = (config.model.recompute, tensor, parts, names(context), kind)
        if key not in self._kept:
            (self._kept[key],) = kept_bytes(config, tensor, parts, kind)
        return Kept(*(size * parts // context for size in self._kept[key]))


def _temporaries(
    config: Configuration,
    sizes: dict[str, int],
    kind: str,
    slots: BufferSlots,
    chunk_rows: int,
    kept: Kept,
    state: StateBytes,
    used: MemoryUse,
) -> int:
    """An estimate, for the rest is exact: the most of a layer's backward, the head, and the step's end.

    The loop over layers has its own copy of what it reads transposed: products for weight gradients contract tokens.
    Gathered at use, the largest array's gradients are transposed once more. With stages, the reductions of the step's
    end run at the same time, each with a transposed copy; without, one after the other.
    """
    shapes = shapes_of(config, sizes, JAXTRON, kind)
    vocab, hidden = shapes.vocab, config.model.hidden_size
    head = TABLES * FLOAT * vocab * hidden + LOGITS * FLOAT * min(shapes.tokens * vocab, CHUNK_ELEMENTS)
    loop = max(_layer(shapes), head) + DEFERRED * shapes.rows * chunk_rows * slots.deferred * kept.deferred
    loop += slots.residuals * chunk_rows * shapes.rows * _transposed(shapes, in_loop=chunk_rows > 1)
    if state.gathered:
        loop += state.largest + TABLES * FLOAT * vocab * hidden
    if config.sharding.zero != "optimizer" or sizes["data"] * sizes["context"] == 1:
        return round(loop)
    reduced = state.master + (state.gradients if sizes["pipe"] > 1 else state.largest)
    return round(max(loop, reduced - used.weights - used.activations - used.messages))


def _layer(shapes: Shapes) -> float:
    """Bytes that a layer's backward needs beside what it kept: of all modules that a layer can have."""
    modules: dict[str, float] = {}
    for kind in shapes.model.kinds:
        needed = LAYER_WORK[kind.symbol].temporaries(shapes)
        modules[kind.module] = max(modules.get(kind.module, 0.0), needed)
    return sum(modules.values())


def _transposed(shapes: Shapes, in_loop: bool) -> int:
    """Bytes of one row of a period that a loop over layers keeps a second time."""
    model = shapes.model
    if "layer" in model.recomputed:
        return 0
    kept = (
        symbol for branch in model.layout.period for symbol in branch if KINDS[symbol].module not in model.recomputed
    )
    return sum(LAYER_WORK[symbol].transposed(shapes, in_loop) for symbol in kept)


def _groups(sizes: dict[str, int]) -> int:
    """Sets of GPUs that communicate: along every choice of the axes there are."""
    return 2 ** sum(part > 1 for part in sizes.values()) - 1


def _parameters(config: Configuration) -> tuple[Parameter, ...]:
    """All arrays of the model, from its blueprint on one device."""
    with use(make_rules(build_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingConfig())):
        plan = make_parts(config.model, DTYPES[config.train.precision]).blueprint
    specs = jax.tree.leaves(plan.parameters)
    rows = [spec.is_stacked for spec in specs]
    return tuple(
        Parameter(spec.axes[row:], spec.shape[row:], spec.role, row) for spec, row in zip(specs, rows, strict=True)
    )


def _rules(sizes: dict[str, int], config: ShardingConfig) -> Rules:
    """Of a mesh without devices: rules read nothing but its sizes."""
    return make_rules(abstract_mesh(MeshConfig(**sizes), math.prod(sizes.values())), config)


def _state(parameter: Parameter, rules: Rules, rows: int, dtype: jnp.dtype) -> StateBytes:
    """One parameter on a device; as `parameters.gather_once` makes the copy to compute with."""
    layout = rules.parameter_layout(parameter.axes, parameter.shape)
    count = rows if parameter.is_stacked else 1
    at_rest, whole = (count * math.prod(rules.part(layout, gathers)) for gathers in ((), layout.once))
    later = layout.at_use != ()
    width = FLOAT if later else working_dtype(parameter.role, dtype).itemsize
    is_copied = (width, whole) != (FLOAT, at_rest)
    return StateBytes(FLOAT * at_rest, 0, width * whole * is_copied, FLOAT * whole, FLOAT * whole, later)


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


def _slots(config: Configuration, num_stages: int) -> BufferSlots:
    pipeline, count = config.pipeline, config.train.microbatches
    if pipeline.schedule.endswith(".csv"):
        lowered = lower(config.schedule(num_stages))
        return BufferSlots(
            lowered.num_residuals[0], lowered.num_deferred[0], lowered.num_inputs, lowered.num_cotangents
        )
    return _made_slots(pipeline.schedule, num_stages, count, pipeline.chunks)


@functools.lru_cache(maxsize=4096)
def _made_slots(name: str, num_stages: int, num_microbatches: int, num_chunks: int) -> BufferSlots:
    lowered = lower(make_schedule(name, num_stages, num_microbatches, num_chunks))
    return BufferSlots(lowered.num_residuals[0], lowered.num_deferred[0], lowered.num_inputs, lowered.num_cotangents)

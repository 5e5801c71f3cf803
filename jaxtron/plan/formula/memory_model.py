"""What fills a GPU's memory in a step, by formula: the classes of `memory.MemoryUse` without compiling anything."""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.data.batch import SEQUENCE, TokenBatch, row_bytes
from jaxtron.gpus import Gpu
from jaxtron.layers.config import GATED
from jaxtron.layers.loss import CHUNK_ELEMENTS
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.pattern import ATTENTIONS, MLP
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.plan.formula.activations import Kept, kept_bytes
from jaxtron.plan.memory_use import NCCL_BUFFERS, MemoryUse, reserved
from jaxtron.roles import Role
from jaxtron.run.attention import select_attention
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.mesh import abstract_mesh, build_mesh
from jaxtron.sharding.parameters import working_dtype
from jaxtron.sharding.rules import Rules, make_rules, use

FLOAT = COUNTER = 4
# What compiled steps hold at their peak beside the classes that shapes explain, as multiples of arrays that are there
# at the same time. Measured on 20 layouts of 1.3 to 1008 billion parameters, JAX 0.11.2 (2026-11): tests/plan/
# test_estimate.py has them. Scores of attention in float32, and MLP's matrix in float32 and the step's type:
SCORES, MATRICES = 2.5, 3.0
# Activations as wide as the MLP; logits of a chunk and the head's table in float32.
HIDDEN, LOGITS, TABLES = 4.0, 3.0, 2.5
# Pairs of backward and weight gradient are copied, and their operands transposed.
PAIRS = 1.2


class BufferSlots(NamedTuple):
    """How many of each buffer's slots a schedule needs."""

    residuals: int
    pairs: int
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
            activations=rows * chunk_rows * (slots.residuals * kept.residuals + slots.pairs * kept.pairs),
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
            self._rows[key] = shortened(config, num_stages).partition(num_stages).slots_per_chunk
        return self._rows[key]

    def _kept_bytes(self, config: Configuration, tensor: int, context: int, kind: str) -> Kept:
        """Of one row. All that is kept has a device's tokens and no more, so that a whole sequence tells what is kept
        of a part, where the same implementation computes its attention."""

        def names(parts: int) -> tuple[str, ...]:
            return tuple(backend.name for backend in select_attention(config, parts, kind).values())

        parts = 1 if names(1) == names(context) else 2
        key = (config.model.recompute, tensor, parts, names(context), kind)
        if key not in self._kept:
            self._kept[key] = kept_bytes(config, tensor, parts, kind)
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
    model, tensor, length = config.model, sizes["tensor"], config.data.sequence_length // sizes["context"]
    rows = config.train.global_batch // config.train.microbatches // (sizes["data"] * sizes["fsdp"])
    width = DTYPES[config.train.precision].itemsize
    tokens, matrix = rows * length, model.hidden_size * model.mlp_width // tensor
    backends = select_attention(config, sizes["context"], kind).values()
    has_scores = any(backend.name == "materialized" for backend in backends)
    layer = SCORES * FLOAT * tokens * length * model.num_heads / tensor * has_scores
    layer += MATRICES * FLOAT * matrix + HIDDEN * tokens * width * model.mlp_width / tensor
    vocab = model.padded_vocab // tensor
    head = TABLES * FLOAT * vocab * model.hidden_size + LOGITS * FLOAT * min(tokens * vocab, CHUNK_ELEMENTS)
    loop = max(layer, head) + PAIRS * rows * chunk_rows * slots.pairs * kept.pairs
    loop += slots.residuals * chunk_rows * rows * _transposed(config, sizes, rows, chunk_rows)
    if state.gathered:
        loop += state.largest + TABLES * FLOAT * vocab * model.hidden_size
    if config.sharding.zero != "optimizer" or sizes["data"] * sizes["context"] == 1:
        return round(loop)
    reduced = state.master + (state.gradients if sizes["pipe"] > 1 else state.largest)
    return round(max(loop, reduced - used.weights - used.activations - used.messages))


def _transposed(config: Configuration, sizes: dict[str, int], rows: int, chunk_rows: int) -> int:
    """Bytes of one row of a period that a loop over layers keeps a second time."""
    model, tensor, length = config.model, sizes["tensor"], config.data.sequence_length // sizes["context"]
    width = DTYPES[config.train.precision].itemsize
    if "layer" in model.recomputed:
        return 0
    found = 0
    if "attention" not in model.recomputed:
        heads = sum(branch.count(symbol) for branch in model.layout.period for symbol in ATTENTIONS)
        found += heads * length * width * model.num_heads * model.head_size // tensor
    # of one row and in a loop of several layers only, and where it is kept as it is multiplied
    if rows == 1 and chunk_rows > 1 and "mlp" not in model.recomputed and model.activation not in GATED:
        mlps = sum(branch.count(MLP) for branch in model.layout.period)
        found += mlps * length * width * model.mlp_width // tensor
    return found


def _groups(sizes: dict[str, int]) -> int:
    """Sets of GPUs that communicate: along every choice of the axes there are."""
    return 2 ** sum(part > 1 for part in sizes.values()) - 1


def _parameters(config: Configuration) -> tuple[Parameter, ...]:
    """All arrays of the model, from its blueprint on one device."""
    with use(make_rules(build_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingConfig())):
        plan = blueprint(lambda rngs: Decoder(config.model, dtype=DTYPES[config.train.precision], rngs=rngs))
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
        program = lower(config.schedule(num_stages))
        return BufferSlots(
            program.num_residuals[0], program.num_pairs[0], program.num_activations, program.num_gradients
        )
    return _made_slots(pipeline.schedule, num_stages, count, pipeline.chunks)


@functools.lru_cache(maxsize=4096)
def _made_slots(name: str, num_stages: int, num_microbatches: int, num_chunks: int) -> BufferSlots:
    program = lower(make_schedule(name, num_stages, num_microbatches, num_chunks))
    return BufferSlots(program.num_residuals[0], program.num_pairs[0], program.num_activations, program.num_gradients)

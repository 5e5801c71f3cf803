"""What fills a GPU's memory in a step, by formula: the classes of `memory.MemoryUse` without compiling anything."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxtron.config import UserError
from jaxtron.gpus import Gpu
from jaxtron.layers.inputs import row_keys
from jaxtron.models.config import ModelConfig
from jaxtron.models.decoder import Decoder
from jaxtron.models.staged import StagedDecoder
from jaxtron.pipeline.layer_loop import LayerLoop
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules import make_schedule
from jaxtron.plan.memory import NCCL_BUFFERS, RESERVE, MemoryUse
from jaxtron.sharding import (
    AXES,
    MANUAL_AXES,
    Rules,
    ShardingConfig,
    blueprint,
    build_mesh,
    current,
    make_rules,
    use,
    vary,
)
from jaxtron.sharding.mesh import MeshConfig
from jaxtron.sharding.parameters import manual_specs, working_dtype
from jaxtron.train.config import Configuration
from jaxtron.train.step import DTYPES
from jaxtron.typing import Array, PyTree, Role

FLOAT = 4
BATCH_BYTES = 12  # of a token: itself, its target and its weight
MOMENTS = {"adamw": 2, "sgd": 1}


class Slots(NamedTuple):
    """How many of each buffer's slots a schedule needs."""

    residuals: int
    pairs: int
    activations: int
    gradients: int


class Kept(NamedTuple):
    """Bytes a device keeps of one row in one period: for backwards, and for weight gradients that were put off.

    `largest` is the largest array among the first.
    """

    residuals: int
    pairs: int
    largest: int


@dataclass(frozen=True)
class Parameter:
    """An array of the model's, whole; of stacked ones `shape` is a row's, without the leading axis."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    role: Role
    is_stacked: bool


class State(NamedTuple):
    """Bytes of a device, or of an array on it: at rest in float32, as a copy to compute with, gradients' sums."""

    master: int
    weights: int
    gradients: int


class Estimator:
    """Bytes by class for any layout of one model; what must be traced for it is traced once."""

    def __init__(self, config: Configuration) -> None:
        self.config = config.resolved()
        self._parameters = _parameters(self.config)
        self._kept: dict[tuple, Kept] = {}
        self._states: dict[tuple, State] = {}

    def memory(self, config: Configuration, sizes: dict[str, int], gpu: Gpu) -> MemoryUse:
        """What `memory.memory_use` finds for the configuration, which may differ from the first in all but the model.

        Exact but for temporaries and the number of sets of GPUs that communicate (so `stages` is left empty). Raises
        `UserError` where a parameter does not divide, or the schedule does not run. Tensor parallelism needs as many
        devices here, simulated ones will do.
        """
        stages, tensor = sizes["pipe"], sizes["tensor"]
        model, train = config.model, config.train
        rows = train.global_batch // train.microbatches // (sizes["data"] * sizes["fsdp"])
        short = _shortened(config, stages)
        slots, chunk_rows = _slots(short, stages), short.partition(stages).chunk_rows
        chunks = config.pipeline.chunks if stages > 1 else 1
        state = self._state(sizes, config, chunks * chunk_rows)
        kept = self._kept_bytes(config, tensor, with_pairs=slots.pairs > 0)
        width = DTYPES[train.precision].itemsize
        x = rows * config.data.sequence_length * model.hidden_size * width // tensor
        travels = stages * chunks > 1
        held = (slots.activations + 1 if travels else 0) + slots.gradients + 1 + travels
        momentum = config.optimizer.name != "sgd" or config.optimizer.momentum > 0
        used = MemoryUse(
            master_weights=state.master,
            optimizer=state.master * MOMENTS[config.optimizer.name] * momentum,
            weights=state.weights,
            gradients=state.gradients,
            activations=rows * chunk_rows * (slots.residuals * kept.residuals + slots.pairs * kept.pairs),
            messages=held * x,
            batch=rows * train.microbatches * config.data.sequence_length * BATCH_BYTES,
            temporaries=0,
            communication=NCCL_BUFFERS * 1,
            reserve=RESERVE,
            capacity=gpu.memory_bytes,
            stages=(),
        )
        return used

    def _state(self, sizes: dict[str, int], config: Configuration, rows: int) -> State:
        """Of all parameters, the layers' in so many rows a stage."""
        key = (*(sizes[axis] for axis in AXES), config.sharding.zero, rows, config.train.precision)
        if key not in self._states:
            rules, dtype = _rules(sizes, config.sharding), DTYPES[config.train.precision]
            found = [_state(parameter, rules, rows, dtype) for parameter in self._parameters]
            self._states[key] = State(*map(sum, zip(*found, strict=True)))
        return self._states[key]

    def _kept_bytes(self, config: Configuration, tensor: int, *, with_pairs: bool) -> Kept:
        key = (config.model.recompute, tensor, with_pairs)
        if key not in self._kept:
            self._kept[key] = kept_bytes(config, tensor, with_pairs=with_pairs)
        return self._kept[key]


def kept_bytes(config: Configuration, tensor: int, *, with_pairs: bool = False) -> Kept:
    """Bytes kept of one row of a microbatch in one period of the pattern, on each of `tensor` devices.

    Traced, never run, on devices of this machine; `UserError` where it has too few.
    """
    if tensor > len(jax.devices()):
        raise UserError(f"mesh.tensor {tensor} is traced on as many devices, here are {len(jax.devices())}: --devices")
    mesh = build_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
    model, dtype = config.model, DTYPES[config.train.precision]
    found: list[list[int]] = []
    with use(make_rules(mesh, ShardingConfig())):
        plan = blueprint(lambda rngs: Decoder(model, dtype=dtype, rngs=rngs))

        def local(params: PyTree, tokens: Array, numbers: Array) -> Array:
            working = plan.working(params, dtype)
            drops = model.dropout > 0 or model.attention_dropout > 0
            keys = row_keys(jax.random.key(0), vary(numbers)) if drops else None
            decoder = plan.module(working)
            x = jax.eval_shape(decoder.embed, vary(tokens), keys)
            shared = decoder.inputs(tokens.shape[1], keys)
            layers = StagedDecoder(plan, working).parameters.layers
            loop = LayerLoop(decoder.stack.layer(), layers, jnp.arange(model.layout.repeats), 1)
            buffer = loop.buffer(x, shared, 1, 1)
            pairs = loop.pairs(x, shared, buffer, 1, 1) if with_pairs else []
            found.extend([list(map(_traced_bytes, buffer)), list(map(_traced_bytes, pairs))])
            return jnp.float32(0.0)

        scalar = PartitionSpec()
        specs = (manual_specs(plan.specs), scalar, scalar)
        region = jax.shard_map(local, in_specs=specs, out_specs=scalar, axis_names=set(MANUAL_AXES))
        tokens = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)
        jax.eval_shape(region, plan.abstract, tokens, jax.ShapeDtypeStruct((1,), jnp.int32))
    residuals, pairs = found
    return Kept(sum(residuals), sum(pairs), max(residuals, default=0))


def _traced_bytes(array: Array) -> int:
    """Those of a device's part."""
    abstract = jax.typeof(array)
    return abstract.size * abstract.dtype.itemsize // current().size(_axes(abstract.sharding.spec))


def _parameters(config: Configuration) -> tuple[Parameter, ...]:
    """All arrays of the model, from its blueprint on one device."""
    with use(make_rules(build_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingConfig())):
        plan = blueprint(lambda rngs: Decoder(config.model, dtype=DTYPES[config.train.precision], rngs=rngs))
        axes = jax.tree.leaves(plan.axes, is_leaf=lambda node: isinstance(node, tuple))
        columns = zip(axes, jax.tree.leaves(plan.shapes), jax.tree.leaves(plan.roles), strict=True)
        found = []
        for names, leaf, role in columns:
            is_stacked = names[:1] == ("layers",)
            found.append(Parameter(names[is_stacked:], leaf.shape[is_stacked:], role, is_stacked))
    return tuple(found)


def _rules(sizes: dict[str, int], config: ShardingConfig) -> Rules:
    """Of a mesh without devices: rules read nothing but its sizes."""
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return make_rules(cast(Mesh, mesh), config)


def _state(parameter: Parameter, rules: Rules, rows: int, dtype: jnp.dtype) -> State:
    """One parameter on a device; as `parameters.gather_once` makes the copy to compute with."""
    axes = _axes(rules.parameter_spec(parameter.axes, parameter.shape))
    size = math.prod(parameter.shape) * (rows if parameter.is_stacked else 1)
    at_rest = size // rules.size(axes)
    whole = size // rules.size(tuple(axis for axis in axes if axis not in rules.gather_once))
    later = rules.size(tuple(axis for axis in axes if axis in rules.gather_at_use)) > 1
    width = FLOAT if later else working_dtype(parameter.role, dtype).itemsize
    is_copied = (width, whole) != (FLOAT, at_rest)
    return State(FLOAT * at_rest, width * whole * is_copied, FLOAT * whole)


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes in a spec."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return tuple(axis for entry in entries for axis in entry)


def _shortened(config: Configuration, num_stages: int) -> Configuration:
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


def _slots(config: Configuration, num_stages: int) -> Slots:
    pipeline, count = config.pipeline, config.train.microbatches
    if pipeline.schedule.endswith(".csv"):
        program = lower(config.schedule(num_stages))
        return Slots(program.num_residuals, program.num_pairs, program.num_activations, program.num_gradients)
    return _made_slots(pipeline.schedule, num_stages, count, pipeline.chunks)


@functools.lru_cache(maxsize=4096)
def _made_slots(name: str, num_stages: int, num_microbatches: int, num_chunks: int) -> Slots:
    program = lower(make_schedule(name, num_stages, num_microbatches, num_chunks))
    return Slots(program.num_residuals, program.num_pairs, program.num_activations, program.num_gradients)

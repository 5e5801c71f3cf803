"""What computes a family of models: what it reads of a step, how it is built, and the pieces that a pipeline runs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.config import UserError
from jaxtron.data.batch import SEQUENCE, batch_fields, normalizers
from jaxtron.data.dataset import Data
from jaxtron.data.source import Source
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.selection import Backend
from jaxtron.layers.config import LoraConfig
from jaxtron.models.adapters import add_adapters
from jaxtron.models.answers import AnswerText
from jaxtron.models.families import family_of, program_of
from jaxtron.models.family import FamilyConfig
from jaxtron.pipeline.model import Model, Outer, Parameters, Stream
from jaxtron.pipeline.partition import Partition, StagePlan, one_stage_plan
from jaxtron.sharding.blueprint import Blueprint, blueprint
from jaxtron.sharding.parameters import gather_at_use
from jaxtron.typing import Array, Bool, DTypeLike, Float, Int, Key, PyTree

BatchT = TypeVar("BatchT")
ModuleT = TypeVar("ModuleT", bound=nnx.Module)
Number = TypeVar("Number")
Buffers = dict[str, Float[Array, "..."]]


@functools.cache
def as_pytree(batch_type: type) -> type:
    """The class of a batch, its arrays seen by JAX from now on; data that are only read need none."""
    return jax.tree_util.register_dataclass(batch_type, data_fields=list(batch_fields(batch_type)), meta_fields=[])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Microbatch(Generic[BatchT]):
    """Some rows of a step's batch on one device, and their numbers in the global batch, for what is drawn by row."""

    batch: BatchT
    rows: Int[Array, "B"]
    row_weights: Float[Array, "B"] | None = None
    """Of each its share of the step's loss, for losses of layers; none where nothing is differentiated."""


@dataclass(frozen=True)
class BuildContext:
    """What a model is built for."""

    dtype: jnp.dtype
    """Of products and activations."""
    partitions: Mapping[str, Partition]
    """The layers in each slot of its stacks, by path."""
    attention: Mapping[str, Backend[Implementation]] | None = None
    """As `Program.attention` selects them (none: for short sequences on the devices here)."""


@dataclass(frozen=True)
class Parts(Generic[ModuleT]):
    """A model's parameters, nested dicts, in the parts that a pipeline tells apart, and the modules of these parts."""

    blueprint: Blueprint[ModuleT]
    stacks: tuple[str, ...]
    """The path of each stack, with `/`."""

    def split(self, params: PyTree) -> Parameters:
        """Parameters, or what is like them, as stacks and the rest."""
        outer = params
        for path in self.stacks:
            outer = _with(outer, path, None)
        return Parameters(tuple(_at(params, path) for path in self.stacks), outer)

    def join(self, parts: Parameters) -> PyTree:
        """The inverse of `split`."""
        params = parts.outer
        for path, stack in zip(self.stacks, parts.stacks, strict=True):
            params = _with(params, path, stack)
        return params

    @functools.cached_property
    def abstract(self) -> ModuleT:
        """The module without values: its settings, and shapes."""
        return self.blueprint.module(self.blueprint.abstract)

    def outer(self, params: Outer) -> ModuleT:
        """The module with these parameters outside of its stacks, which have no values."""
        stacks = self.split(self.blueprint.abstract).stacks
        return self.blueprint.module(self.join(Parameters(stacks, params)))

    def layer(self, stack: int, params: PyTree, kind: str | None = None) -> Any:
        """The module of a layer (of a kind, where those of the stack are of several) with the parameters of a slot."""
        module = self.abstract
        for name in (*self.stacks[stack].split("/"), *((kind,) if kind else ())):
            module = getattr(module, name)
        return nnx.merge(nnx.split(module)[0], params)


@dataclass(frozen=True)
class Program(Generic[BatchT, ModuleT]):
    """A family's half that needs JAX; see `family.Family` for the other."""

    batch: type[BatchT]
    """What a step reads: a dataclass of `data/batch.py`."""
    losses: Mapping[str, str]
    """Sums that the head reports whose means add up to the loss, and the normalizers that make them means."""
    build: Callable[[Any, BuildContext, nnx.Rngs], ModuleT]
    """The module, whose stacks were made by `stacked.stacked`; inside `sharding.use(rules)`."""
    model: Callable[[Parts[ModuleT], Key[Array, ""] | None], Model]
    """(parts, key of dropout) -> what a pipeline runs on a `Microbatch`; without a key nothing is dropped."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Further sums that the head reports, and their normalizers."""
    lengths: Callable[[Any, int], dict[str, int]] = lambda config, length: {SEQUENCE: length}
    """(config, data.sequence_length) -> sizes of the axes that the batch's fields name."""
    source: Callable[[Any, Source, Tokenizer], Source] = lambda config, source, tokenizer: source
    """Samples of `batch` made of the data's own, which are of `TokenBatch`."""
    open_data: Callable[..., Data] | None = None
    """(config, data's settings, seed=, train_samples=) -> data whose samples are of `batch`, which the family opens
    itself (`data/masked/sentences.py`); none: `data.dataset.open_data`, with samples that `source` makes."""
    attention: Callable[..., Mapping[str, Backend[Implementation]]] = lambda config, dtype, **devices: {}
    """(config, dtype, device_kind=, parts=, length=, packed=) -> the backends of its kinds of attention by name."""
    choices: Callable[[Any, DTypeLike, int, int], tuple[str, ...]] = lambda config, dtype, rows, length: ()
    """(config, dtype, rows, length) -> lines that say what else is chosen for a device with so many rows of so many
    tokens in a microbatch, and why; inside `sharding.use(rules)`."""
    update_buffers: Callable[[Parts[ModuleT], Buffers, Mapping[str, Array]], Buffers] | None = None
    """(parts, buffers, what a step reports) -> the buffers after it, where it was not skipped; none: they stay.

    Buffers (`sharding.parameters.buffer`) are named as metrics of layers are, by their path with `/`, and have a row
    for each layer in the model's order. What is reported is of the global batch, the same on every device and mesh;
    metrics that were made with the batch's weights have the loss scale of fp16 in them.
    """
    figures: Callable[[Any, Mapping[str, float], Mapping[str, float]], dict[str, float]] = lambda *_: {}
    """(config, sums of the head over a validation, counts of their normalizers) -> what is told of it beside the loss,
    by name: scores of a task."""
    predict: Callable[[Parts[ModuleT], Outer, Stream, Int[Array, ""]], Float[Array, "V"]] | None = None
    """(parts, outer parameters, what left the layers, place) -> logits of what follows that place in the first row."""
    logits: Callable[[Parts[ModuleT], Outer, Stream], Float[Array, "B S V"]] | None = None
    """(parts, outer parameters, what left the layers) -> logits of what follows each token here, the vocabulary split
    over tensor and with its padding (none: it gives none)."""
    token_rows: Callable[[Int[Any, "B S"], Bool[Any, "B S"], Int[Any, "B T"] | None], BatchT] | None = None
    """(tokens of texts, which are no padding, a decoder's tokens where there are any) -> a batch that weighs nothing,
    of which `logits` tells (none: of tokens alone it makes none)."""
    steps: Callable[[ModuleT, tuple[Partition, ...]], Any] | None = None
    """(module with the weights of a stage, layers of the stages by stack) -> the model as it writes, a token at a time:
    a `growing.WritingModel` (none: `Family.writes` says that it writes nothing)."""
    answers: Callable[[Any, Tokenizer, int | None, int | None], AnswerText] | None = None
    """(config, tokenizer, what an answer begins with by the model's own files, what ends it) -> how texts are read and
    written, where `Family.writes` answers."""

    def __post_init__(self) -> None:
        as_pytree(self.batch)
        counted = normalizers(self.batch)
        for name, normalizer in {**self.losses, **self.metrics}.items():
            if normalizer not in counted:
                raise UserError(
                    f"the program's {name!r} is a mean over {normalizer!r}, which no weight of {self.batch.__name__} "
                    f"counts: it is one of {', '.join(counted) or 'none'}"
                )

    def reported(self, means: Mapping[str, Number]) -> dict[str, Number]:
        """What a step tells of the means of the head's sums: the loss, and where it has several summands, these too."""
        known = {**self.losses, **self.metrics}
        if means.keys() != known.keys():
            raise UserError(
                f"the head of models of {self.build.__module__} reports {', '.join(sorted(means))}; the losses and "
                f"metrics of its PROGRAM are {', '.join(sorted(known))}"
            )
        parts = {name: mean for name, mean in means.items() if name in self.metrics or len(self.losses) > 1}
        first, *others = (means[name] for name in self.losses)
        total: Any = first
        for mean in others:
            total = total + mean
        return {"loss": total, **parts}

    def loss(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> float:
        """The sum of the losses' means; one that nothing counts is left out."""
        means = (sums[name] / counts[norm] for name, norm in self.losses.items() if counts[norm])
        return sum(means)


def make_parts(
    config: FamilyConfig,
    dtype: DTypeLike,
    stages: StagePlan | None = None,
    attention: Mapping[str, Backend[Implementation]] | None = None,
    lora: LoraConfig | None = None,
) -> Parts[Any]:
    """The parts of a model, inside `sharding.use(rules)`; `stages` has its layers (none: one stage).

    With `lora` its linear layers have adapters; all that is drawn beside them is what it is without.
    """
    family = family_of(config)
    stacks = family.stacks(config)
    stages = stages or one_stage_plan(tuple(stacks.values())).of_kinds(family.kinds(config))
    context = BuildContext(jnp.dtype(dtype), dict(zip(stacks, stages.partitions, strict=True)), attention)
    build = functools.partial(_build, config, context, lora)
    found = blueprint(build)
    for path in stacks:
        if not any(name.startswith(f"{path.replace('/', '.')}.") for name in found.names):
            raise UserError(
                f"model.family {config.family}: its stacks name {path!r}, where its module has no parameters; they are "
                f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in found.names))}"
            )
    return Parts(found, tuple(stacks))


def _build(config: FamilyConfig, context: BuildContext, lora: LoraConfig | None, rngs: nnx.Rngs) -> nnx.Module:
    module = program_of(config).build(config, context, rngs)
    if lora is not None:
        add_adapters(module, lora, context.partitions, rngs)
    return module


def whole(module: ModuleT, dtype: DTypeLike) -> ModuleT:
    """The module with its weights whole and matrices in `dtype`: where it is about to run (`gather_at_use`)."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, gather_at_use(state, jnp.dtype(dtype)))


def _at(params: PyTree, path: str) -> PyTree:
    for name in path.split("/"):
        params = params[name]
    return params


def _with(params: PyTree, path: str, part: PyTree) -> PyTree:
    """Nested dicts with `part` at the path; None takes it out."""
    name, _, rest = path.partition("/")
    if rest:
        return {**params, name: _with(params.get(name, {}), rest, part)}
    others = {other: value for other, value in params.items() if other != name}
    return others if part is None else {**others, name: part}

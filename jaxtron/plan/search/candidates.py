"""Layouts for so many GPUs: what a search chooses from."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtron.config import UserError
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.plan.compiled.deviceless import MORE
from jaxtron.plan.hint import LEAST_PART
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.config import ContextConfig, MeshConfig
from jaxtron.sharding.folding import FLAGS, Flag, refine
from jaxtron.words import plural

# Rows of a microbatch on a device. More only fill memory: products of so many tokens are large enough.
ROWS = (1, 2, 4, 8, 16)
# Empty rows of the longest part's length, over all layers, that a cut which does not divide them may have.
MOST_EMPTY = 0.1
# All that have a use: gpipe takes the time of 1f1b and more memory.
ONE_CHUNK = ("1f1b", "eager_1f1b", "zero_bubble")
TWO_CHUNKS = ("zero_bubble_v", "dualpipe_v")
MORE_CHUNKS = ("interleaved", "eager_interleaved")
# those with a forward and a backward of different microbatches at one tick
PAIRED = ("eager_1f1b", "eager_interleaved", "dualpipe_v")
Order = tuple[Flag, ...]
# Instead of the usual order: weights are gathered inside a node, and pieces of keys and values travel between nodes.
FSDP_INSIDE: Order = ("pipe", "data", "context", "fsdp", "tensor")
# Settings that a layout decides, by section; of the pipeline an own layout may have more.
SETTINGS = {
    "mesh": ("data", "fsdp", "context", "tensor", "pipe", "expert", "expert_tensor", "order"),
    "context": ("method", "inner"),
    "pipeline": ("schedule", "chunks", "overlap", "embedding_weight", "loss_weight"),
    "train": ("microbatches",),
    "model": ("recompute",),
    "sharding": ("zero",),
}


@dataclass(frozen=True)
class CandidateLayout:
    """What a search chooses; `rows` are those of a microbatch on a device."""

    data: int
    fsdp: int
    tensor: int
    pipe: int
    pipeline: PipelineConfig
    rows: int
    recompute: str | tuple[str, ...] | None
    """None where the model has no such setting."""
    zero: str
    context: int = 1
    attention: ContextConfig = ContextConfig()
    """How attention sees the other parts of a sequence, where `context` is above 1."""
    expert: int = 1
    expert_tensor: int = 1
    order: Order = FLAGS

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh by flag of the layers' view, outermost first."""
        return {axis: getattr(self, axis) for axis in self.order}

    @property
    def experts(self) -> dict[str, int]:
        """What the experts' view has of it."""
        return {"expert": self.expert, "expert_tensor": self.expert_tensor}

    @property
    def has_shared_state(self) -> bool:
        """Whether several devices sum the same gradients, so that the ZeRO level has an effect."""
        return self.data * self.context > 1

    def microbatches(self, global_batch: int) -> int:
        """Microbatches of a step."""
        return global_batch // (self.data * self.fsdp * self.rows)

    def config(self, base: Configuration) -> Configuration:
        """The configuration with this layout, not validated again: `predict` checks what can be wrong with it."""
        microbatches = self.microbatches(base.train.global_batch)
        model = {} if self.recompute is None else {"recompute": self.recompute}
        return base.model_copy(
            update={
                "mesh": MeshConfig(**self.sizes, **self.experts, order=self.order),
                "context": self.attention,
                "pipeline": self.pipeline,
                "model": base.model.model_copy(update=model),
                "train": base.train.model_copy(update={"microbatches": microbatches}),
                "sharding": base.sharding.model_copy(update={"zero": self.zero}),
            }
        )

    def flags(self, base: Configuration) -> str:
        """What to type after the configuration's file to have this layout."""
        config = self.config(base)
        words = []
        for section, names in SETTINGS.items():
            for name in names:
                value, before = (getattr(getattr(one, section), name, None) for one in (config, base))
                # an axis left open is filled with what the others leave
                if value != before and not (section == "mesh" and before == -1):
                    words.append(f"--{section}.{name} {_typed(value)}")
        return " ".join(words)

    def differences(self, other: "CandidateLayout") -> list[str]:
        """What this layout has instead of another, such as `tensor 4 instead of 8`."""
        mine, its = self._words(), other._words()
        split = [flag for flag in FLAGS if self.sizes[flag] > 1 and other.sizes[flag] > 1]
        mine["mesh.order"], its["mesh.order"] = ("-".join(sorted(split, key=one.order.index)) for one in (self, other))
        both = [name for name in mine if name in its]
        return [f"{name} {mine[name]} instead of {its[name]}" for name in both if mine[name] != its[name]]

    def _words(self) -> dict[str, str]:
        words = {flag: str(part) for flag, part in (self.sizes | self.experts).items()}
        words["rows"] = str(self.rows)
        if self.recompute is not None:
            words["recompute"] = self.recompute_text
        if self.pipe > 1:
            words["schedule"] = self.order_text
        if self.context > 1:
            words["context.method"] = self.attention.method
        return words | ({"zero": self.zero} if self.has_shared_state else {})

    @property
    def zero_text(self) -> str:
        """The ZeRO level, where it has an effect."""
        return self.zero if self.has_shared_state else "-"

    @property
    def mesh_text(self) -> str:
        """Such as `pipe 4 x tensor 8`, outermost first, or `data 8; expert 8`."""
        views = [
            " x ".join(f"{flag} {part}" for flag, part in view.items() if part > 1)
            for view in (self.sizes, self.experts)
        ]
        return "; ".join(filter(None, views)) or "one device"

    @property
    def order_text(self) -> str:
        """The schedule with its chunks, where there are stages."""
        if self.pipe == 1:
            return "-"
        chunks = f" x {self.pipeline.chunks}" if self.pipeline.chunks > 1 else ""
        return self.pipeline.schedule + chunks + " overlapped" * self.pipeline.overlap

    def text(self, global_batch: int) -> str:
        """All of it in a line."""
        parts = [self.mesh_text, self.order_text if self.pipe > 1 else "", f"rows {self.rows}"]
        parts.append(plural(self.microbatches(global_batch), "microbatch"))
        parts.append("" if self.recompute is None else f"recompute {self.recompute_text}")
        parts.append(f"zero {self.zero}" if self.has_shared_state else "")
        return ", ".join(part for part in parts if part)

    @property
    def recompute_text(self) -> str:
        """What is computed again."""
        if self.recompute is None:
            return "-"
        return self.recompute if isinstance(self.recompute, str) else ",".join(self.recompute)


def layouts(config: Configuration, num_gpus: int, gpus_per_node: int) -> Iterator[CandidateLayout]:
    """All layouts worth a look: the mesh and its order, schedule, chunks, rows, recompute and ZeRO level, model and
    batch as given.

    `tensor` stays inside a node. `sharding.zero parameters` is left out where `mesh.fsdp` does the same: there is no
    `mesh.context` whose devices share the state too.
    """
    batch = config.train.global_batch
    recomputes = tuple(dict.fromkeys((_recompute(config), *config.family.recompute(config.model))))
    for tensor, context, attention in _within(config, num_gpus, gpus_per_node):
        for pipe in _divisors(num_gpus // (tensor * context)):
            shards = num_gpus // (tensor * context * pipe)
            if batch % shards:
                continue
            for pipeline in _pipelines(config, pipe):
                for rows in (rows for rows in ROWS if batch // shards % rows == 0):
                    if not _feeds(pipeline, pipe, batch // shards // rows):
                        continue
                    for data, fsdp, zero in _shardings(config, shards, context):
                        sizes = {"pipe": pipe, "data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
                        for order in _orders(config, sizes, gpus_per_node):
                            for (expert, width), recompute in itertools.product(
                                _foldings(config, sizes, order, gpus_per_node), recomputes
                            ):
                                yield CandidateLayout(
                                    data,
                                    fsdp,
                                    tensor,
                                    pipe,
                                    pipeline,
                                    rows,
                                    recompute,
                                    zero,
                                    context,
                                    attention,
                                    expert,
                                    width,
                                    order,
                                )


def own_layout(config: Configuration, num_gpus: int) -> CandidateLayout:
    """The layout that a configuration has on so many GPUs; a `UserError` if it has none."""
    sizes = config.mesh.shape(num_gpus, more=MORE)
    config.check_mesh(sizes)
    shards = sizes["data"] * sizes["fsdp"]
    return CandidateLayout(
        data=sizes["data"],
        fsdp=sizes["fsdp"],
        tensor=sizes["tensor"],
        pipe=sizes["pipe"],
        pipeline=config.pipeline,
        rows=config.train.global_batch // (config.train.microbatches * shards),
        recompute=_recompute(config),
        zero=config.sharding.zero,
        context=sizes["context"],
        attention=config.context,
        expert=config.mesh.expert,
        expert_tensor=config.mesh.expert_tensor,
        order=_distinct((FLAGS, config.mesh.order), sizes)[-1],
    )


def _typed(value: object) -> str:
    """As it is typed on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _orders(config: Configuration, sizes: dict[str, int], gpus_per_node: int) -> list[Order]:
    """The usual order, the configuration's, and `FSDP_INSIDE` where not both fsdp and context lie in a node."""
    tried = [FLAGS, config.mesh.order]
    if sizes["fsdp"] * sizes["context"] * sizes["tensor"] > gpus_per_node:
        tried.append(FSDP_INSIDE)
    return _distinct(tried, sizes)


def _distinct(orders: Sequence[Order], sizes: dict[str, int]) -> list[Order]:
    """Of orders that put the devices of a mesh of these sizes alike the first."""
    found: dict[tuple[str, ...], Order] = {}
    for order in orders:
        found.setdefault(tuple(flag for flag in order if sizes[flag] > 1), order)
    return list(found.values())


def _foldings(config: Configuration, sizes: dict[str, int], order: Order, gpus_per_node: int) -> list[tuple[int, int]]:
    """Parts of experts and of their width over the devices of a stage, a width inside a node."""
    experts = config.family.experts(config.model)
    if experts is None:
        return [(1, 1)]
    stage = tuple((sizes | {"pipe": 1}).items())
    return _refined(experts.count[1], experts.width[1], stage, order, gpus_per_node)


@functools.lru_cache(maxsize=1024)
def _refined(
    count: int, width: int, sizes: tuple[tuple[str, int], ...], order: Order, gpus_per_node: int
) -> list[tuple[int, int]]:
    """Those whose cuts of the devices go with the others'."""
    devices = math.prod(size for _, size in sizes)
    found = []
    for expert in _divisors(math.gcd(devices, count)):
        for parts in _divisors(math.gcd(devices // expert, width, gpus_per_node)):
            try:
                refine(dict(sizes), expert, parts, order)
            except UserError:
                continue
            found.append((expert, parts))
    return found


def _recompute(config: Configuration) -> str | tuple[str, ...] | None:
    """The model's own setting, where it has one."""
    return getattr(config.model, "recompute", None)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def splits_sequences(config: Configuration) -> bool:
    """Whether a search tries `mesh.context` above 1, so that two parts of a sequence must be traced."""
    return config.mesh.context != 1 or config.data.sequence_length >= 2 * LEAST_PART


def _within(config: Configuration, num_gpus: int, gpus_per_node: int) -> Iterator[tuple[int, int, ContextConfig]]:
    """Ways to split a layer and its sequences: `mesh.tensor`, `mesh.context`, and attention over its parts."""
    length, own = config.data.sequence_length, config.mesh.context
    for tensor in _divisors(min(gpus_per_node, num_gpus)):
        for context in _divisors(num_gpus // tensor) if num_gpus % tensor == 0 else ():
            if context in (1, own) or length >= context * LEAST_PART:
                for attention in _attention(config, tensor, context):
                    yield tensor, context, attention


def _attention(config: Configuration, tensor: int, context: int) -> Iterator[ContextConfig]:
    """Attention as configured, or by a ring where that needs another size; none where heads, MLP, vocabulary or
    sequence do not split so: what `check_mesh` says of one stage and one replica."""
    train = config.train.model_copy(update={"batch_ramp": None, "microbatches": 1})
    alone = config.model_copy(update={"pipeline": PipelineConfig(), "train": train})
    sizes = {axis: 1 for axis in FLAGS} | {"tensor": tensor, "context": context}
    for attention in dict.fromkeys((config.context, ContextConfig())):
        try:
            alone.model_copy(update={"context": attention}).check_mesh(sizes)
        except UserError:
            continue
        yield attention
        return


def _pipelines(config: Configuration, num_stages: int) -> Iterator[PipelineConfig]:
    """Schedules and chunks for so many stages: all cuts that divide the layers, or nearly where the stages do not.

    What the configuration overlaps is tried either way."""
    if num_stages == 1:
        yield PipelineConfig()
        return
    stacks, cuts = config.family.stacks(config.model).values(), config.family.cuts(config.model)
    weights = {name: getattr(config.pipeline, name) for name in ("embedding_weight", "loss_weight")}
    if cuts is not None:
        chunks = [len(cuts.layers) // num_stages] if len(cuts.layers) % num_stages == 0 else []
        weights = {}
    else:
        most = min(stacks) // num_stages
        chunks = [count for count in range(1, most + 1) if all(_cuts(layers, num_stages, count) for layers in stacks)]
    for count in chunks:
        # those of all stacks are a schedule's
        whole = count * len(stacks)
        names = ONE_CHUNK if whole == 1 else (*MORE_CHUNKS, *TWO_CHUNKS) if whole == 2 else MORE_CHUNKS
        for name in names:
            yield PipelineConfig(schedule=name, chunks=count, **weights)
            if config.pipeline.overlap and name in PAIRED:
                yield PipelineConfig(schedule=name, chunks=count, overlap=True, **weights)


def _cuts(num_layers: int, num_stages: int, num_chunks: int) -> bool:
    parts = num_stages * num_chunks
    if num_layers % num_stages == 0:
        return num_layers % parts == 0
    return -(-num_layers // parts) * parts <= (1 + MOST_EMPTY) * num_layers


def _feeds(pipeline: PipelineConfig, num_stages: int, num_microbatches: int) -> bool:
    """Whether the schedule runs so many microbatches without holes."""
    if pipeline.schedule in MORE_CHUNKS:
        return num_microbatches % num_stages == 0
    return pipeline.schedule != "dualpipe_v" or num_microbatches >= 2 * num_stages


def _shardings(config: Configuration, shards: int, context: int) -> Iterator[tuple[int, int, str]]:
    """Ways to split so many replicas: data, fsdp and the ZeRO level, which has an effect with data or context only."""
    for fsdp in _divisors(shards):
        data = shards // fsdp
        levels = ("none", "optimizer") if data * context > 1 else (config.sharding.zero,)
        if data == 1 < context:
            levels = (*levels, "parameters")
        for zero in levels:
            yield data, fsdp, zero

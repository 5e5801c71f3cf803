"""Sequences that grow by what a model makes of them: what its layers remember, and a pass through all stages.

A stage has all of its layers as one, which the executor runs as it runs a layer of training; rows are in groups, of
which each stage has one at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtron.config import UserError
from jaxtron.layers.cache import Growth
from jaxtron.layers.inputs import BranchOutput
from jaxtron.models.joined import JoinsWeights
from jaxtron.pipeline import executor
from jaxtron.pipeline.layer_loop import Remembering
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Parameters, Stack
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float, Int, PyTree

ModuleT = TypeVar("ModuleT", bound=nnx.Module)
# (number of a layer here, the stream, what the layer remembers, what all read) -> the stream, what it then remembers
GrowingLayer = Callable[[int, Array, PyTree, PyTree], tuple[Array, PyTree]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("layers", "lengths", "sources"), meta_fields=("room",)
)
@dataclasses.dataclass(frozen=True)
class SequenceMemory:
    """What a device remembers of its sequences so far; rows are in groups, of which each stage has one at a time."""

    layers: tuple[PyTree, ...]
    """Of each layer of the stage: arrays [group, 1, row, ...]."""
    lengths: Int[Array, "B"]
    """Positions of each row so far."""
    room: int
    """Those that a row may come to have."""
    sources: Int[Array, "B"] | None = None
    """Tokens of the text that each row answers, where that is a sequence of its own."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGroup:
    """What a group of rows is given: a microbatch of the executor."""

    number: Int[Array, ""]
    tokens: Int[Array, "B S"]
    growth: Growth
    sources: Int[Array, "B"] | None = None
    """As those of the memory."""


@runtime_checkable
class WritingModel(Protocol):
    """A model in steps, as `Program.steps` makes it; for the manual region, inside `sharding.use(rules)`."""

    def start(self, rows: int, room: int) -> SequenceMemory:
        """What is remembered of so many rows before anything comes, with room for so many tokens each."""
        ...

    def begin(
        self, tokens: Int[Array, "B S"], counts: Int[Array, "B"], room: int, opening: tuple[int, ...]
    ) -> tuple[Float[Array, "B V"], SequenceMemory]:
        """Logits of what comes first after prompts of so many tokens, and what is then remembered.

        `opening` are the tokens that an answer begins with, where it is a sequence of its own (else none). Of a row
        with no tokens nothing means anything.
        """
        ...

    def advance(
        self, tokens: Int[Array, "B S"], memory: SequenceMemory, counts: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B V"], SequenceMemory]:
        """The same after further tokens, of each row so many (none: all)."""
        ...


def check_steps(partition: Partition) -> None:
    """`UserError` for devices along `context`, which would split a token's position, and for chunks."""
    if current().parts("context") > 1:
        raise UserError("going on from a memory needs --mesh.context 1")
    if partition.num_chunks > 1:
        raise UserError("going on from a memory needs --pipeline.chunks 1")


def one_of(stacked: ModuleT, number: int) -> ModuleT:
    """One of the modules that are stacked here."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda array: array[number], state))


def without(module: ModuleT, *names: str) -> ModuleT:
    """A copy of a module that has none of these parts."""
    graph, state = nnx.split(module)
    apart = nnx.merge(graph, state)
    for name in names:
        delattr(apart, name)
    return apart


def join_weights(module: nnx.Module) -> None:
    """Joins in place what its modules multiply by as one, where they do."""
    for _, one in nnx.iter_modules(module):
        if isinstance(one, JoinsWeights) and one.weights_to_join():
            one.join_weights()


def grouped(groups: int, *arrays: PyTree) -> tuple[PyTree, ...]:
    """Arrays by row as arrays by group and row, after the number of each group."""
    split = jax.tree.map(lambda array: vary(array.reshape(groups, -1, *array.shape[1:])), arrays)
    return jnp.arange(groups, dtype=jnp.int32), *split


def through_stages(
    sequences: tuple[tuple[int, ...], ...],
    layer: GrowingLayer,
    *,
    enter: Callable[[PyTree], Array],
    shared: Callable[[PyTree], PyTree],
    head: Callable[[Array, PyTree], Float[Array, "R ..."]],
    rows: PyTree,
    memory: tuple[PyTree, ...] = (),
) -> tuple[Float[Array, "groups R ..."], tuple[PyTree, ...]]:
    """What a head makes of the last layer's output, in float32 on every stage, and what layers then remember.

    `sequences` say of each stage which of its layers it runs, in order. `rows` have a leading axis of groups, and in
    `number` that of the group; `enter`, `shared` and `head` are given those of one. Layers that have no `memory` are
    given none.
    """
    groups, stages = len(rows.number), len(sequences)

    def run(_weights: PyTree, x: Array, stage: Int[Array, ""], given: PyTree) -> LayerOutput:
        inputs, own = (given.shared, given.memory) if isinstance(given, Remembering) else (given, None)

        def through(sequence: tuple[int, ...], x: Array, memories: PyTree) -> tuple[Array, PyTree]:
            found = None if memories is None else list(memories)
            for number in sequence:
                x, new = layer(number, x, None if found is None else found[number], inputs)
                if found is not None:
                    found[number] = new
            return jax.tree.map(vary, (x, None if found is None else tuple(found)))

        kinds = list(dict.fromkeys(sequences))
        branches: list[Callable] = [functools.partial(through, one) for one in kinds]
        if len(branches) == 1:
            x, memories = branches[0](x, own)
        else:
            numbers = jnp.asarray([kinds.index(one) for one in sequences], jnp.int32)
            x, memories = jax.lax.switch(numbers[stage], branches, x, own)
        return LayerOutput(x, cache=memories)

    stack = Stack(lambda _outer, _received, rows: enter(rows), shared, run)
    plan = StagePlan((Partition((1,) * stages, stages),))
    model = Model((stack,), functools.partial(_head, groups, head))
    remembered = (memory,) if jax.tree.leaves(memory) else ()
    result = executor.run(forward_only(plan, groups), plan, model, Parameters(({},), {}), rows, memory=remembered)
    found = result.sums["head"]
    if stages > 1:
        # only the last stage has any
        found = vary(all_reduce(found, current().axes("pipe")))
    return found, result.memory[0] if remembered else ()


def _head(groups: int, make: Callable[[Array, PyTree], Array], _outer: PyTree, x: Array, rows: PyTree) -> HeadOutput:
    """What `make` makes of the last layer's output, in the place of its group: sums over groups keep them apart."""
    found = make(x, rows).astype(jnp.float32)[None]
    if groups > 1:
        is_own = (jnp.arange(groups) == rows.number).reshape(-1, *(1,) * (found.ndim - 1))
        found = jnp.where(is_own, found, 0)
    return HeadOutput(jnp.float32(0.0), {"head": found})


def last_position(x: Float[Array, "B S E"], growth: Growth) -> Float[Array, "B 1 E"]:
    """The stream at the last position of each row that is no padding."""
    return jnp.take_along_axis(x, jnp.maximum(growth.counts - 1, 0)[:, None, None], 1)


def insert(memory: SequenceMemory, new: SequenceMemory, slots: Int[Array, "A"]) -> SequenceMemory:
    """The memory with new rows in those places; a row whose slot is beyond the last has none, and is left out."""

    def layer(old: Array, new: Array) -> Array:
        layout = jax.typeof(old).sharding.spec

        def local(old: Array, new: Array, slots: Array) -> Array:
            flat = old.reshape(-1, *old.shape[3:]).at[slots].set(new.reshape(-1, *new.shape[3:]), mode="drop")
            return flat.reshape(old.shape)

        return on_each_device(local, (layout, layout, PartitionSpec(None)), layout)(old, new, slots)

    of_rows = (memory.lengths, memory.sources), (new.lengths, new.sources)
    lengths, sources = jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), *of_rows)
    return SequenceMemory(jax.tree.map(layer, memory.layers, new.layers), lengths, memory.room, sources)


def memory_groups(memory: SequenceMemory) -> int:
    """Groups that its rows are in."""
    return jax.tree.leaves(memory.layers)[0].shape[0]


def in_groups(array: Array, groups: int) -> Array:
    """What a layer remembers of rows, as `SequenceMemory.layers` has it."""
    shape, layout = (groups, 1, len(array) // groups, *array.shape[1:]), jax.typeof(array).sharding.spec
    return jnp.reshape(array, shape, out_sharding=PartitionSpec(None, None, *layout))


def by_position(call: Callable[..., Float[Array, "B S E"] | BranchOutput], *arrays: Array) -> Float[Array, "B S E"]:
    """What a function of each position for itself makes of [B, S, ...] arrays that are whole on every part of `tensor`.

    It is given a sequence that can be split over `tensor`: all rows as one, and padding.
    """
    parts, (rows, length) = current().parts("tensor"), arrays[0].shape[:2]
    if parts == 1:
        y = call(*arrays)
        return constrain(y.x if isinstance(y, BranchOutput) else y, "batch", "full_seq", "embed")
    count = rows * length
    flat = (array.reshape(1, count, *array.shape[2:]) for array in arrays)
    padding = -count % parts
    y = call(*(jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2))) for array in flat))
    y = constrain(y.x if isinstance(y, BranchOutput) else y, "batch", "full_seq", "embed")
    return y[:, :count].reshape(rows, length, -1)

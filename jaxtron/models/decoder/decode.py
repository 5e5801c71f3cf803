"""A decoder that goes on from what its layers remember: sequences in parts, at last one token at a time.

Layers are apart here, each with parameters of its own, so that a step reads these and copies none. A pipeline's stage
has all of its layers as one, which the executor runs as it runs a layer of training.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtron.config import UserError
from jaxtron.layers.cache import Growth
from jaxtron.layers.inputs import LayerInputs
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.stack import Layer, Memories, by_position
from jaxtron.models.joined import JoinsWeights
from jaxtron.models.program import whole
from jaxtron.pipeline import executor
from jaxtron.pipeline.layer_loop import Remembering
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Parameters, Stack
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float, Int, PyTree, Shaped

ModuleT = TypeVar("ModuleT", bound=nnx.Module)
# of a score that are in memory at once: 256 MiB
MOST_LOGITS = 2**26


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers", "lengths"), meta_fields=("room",))
@dataclasses.dataclass(frozen=True)
class DecoderMemory:
    """What a device remembers of its sequences so far; rows are in groups, of which each stage has one at a time."""

    layers: tuple[Memories, ...]
    """Of each layer of the stage: arrays [group, 1, row, ...]."""
    lengths: Int[Array, "B"]
    """Positions of each row so far."""
    room: int
    """Those that a row may come to have."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Group:
    """What a group of rows is given: a microbatch of the executor."""

    number: Int[Array, ""]
    tokens: Int[Array, "B S"]
    growth: Growth


class Steps(nnx.Module):
    """A decoder whose layers are apart, with their weights whole and in its type; inside `sharding.use(rules)`.

    `partition` says which layers a stage has, in one chunk; inside a pipeline's region each stage makes its own. Along
    `data` and `fsdp` rows are shared out, along `tensor` heads and widths. `UserError` for devices along `context`,
    which would split a token's position, and for chunks.
    """

    def __init__(self, decoder: Decoder, partition: Partition) -> None:
        if current().parts("context") > 1:
            raise UserError("going on from a memory needs --mesh.context 1")
        if partition.num_chunks > 1:
            raise UserError("going on from a memory needs --pipeline.chunks 1")
        self.decoder = _without_layers(decoder)
        self.layers = nnx.List([whole(layer, decoder.dtype) for layer in _of_stage(decoder, partition)])
        for _, module in nnx.iter_modules(self):
            if isinstance(module, JoinsWeights) and module.weights_to_join():
                module.join_weights()
        self.sequences = _sequences(decoder, partition)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.sequences)

    def start(self, rows: int, room: int, most: int = 1) -> DecoderMemory:
        """What is remembered of sequences that begin; attention has room for so many positions.

        After the beginning at most `most` positions come at a time. Stages work at once where rows are a multiple of
        them, else one after the other.
        """
        groups = self.num_stages if rows % self.num_stages == 0 else 1

        def of(layer: Layer) -> Memories:
            memories = layer.start(rows // groups, room, most, self.decoder.dtype)
            return jax.tree.map(lambda array: jnp.broadcast_to(array, (groups, 1, *array.shape)), memories)

        return DecoderMemory(tuple(map(of, self.layers)), vary(jnp.zeros(rows, jnp.int32)), room)

    def advance(
        self,
        tokens: Int[Array, "B S"],
        memory: DecoderMemory,
        counts: Int[Array, "B"] | None = None,
        *,
        begins: bool = False,
    ) -> tuple[Float[Array, "B V"], DecoderMemory]:
        """Logits of what follows these tokens, the vocabulary's padding included, and what is then remembered.

        `counts` of each row's tokens are new (none: all), padding follows them; a row of which none is new stays as it
        is, and its logits mean nothing. `begins`: nothing came before in any row, whatever the memory says. There has
        to be room: what goes beyond it overwrites what was there.
        """
        rows, length = tokens.shape
        before = jnp.zeros_like(memory.lengths) if begins else memory.lengths
        counts = jnp.full((rows,), length, jnp.int32) if counts is None else counts
        logits, layers = self._through(tokens, Growth(before, counts, begins), memory, self._last_logits)
        return logits.reshape(rows, -1), DecoderMemory(layers, before + counts, memory.room)

    def score(
        self, tokens: Int[Array, "B S"], targets: Int[Array, "B S"], counts: Int[Array, "B"], vocab: int, top: int
    ) -> tuple[Float[Array, "B S"], Int[Array, "B S top"], Float[Array, "B S top"]]:
        """Of sequences that begin natural logarithms: of the probability of the target in each place, and the `top`
        best of the first `vocab` tokens there, with theirs."""
        memory, (rows, length) = self.start(len(tokens), tokens.shape[1]), tokens.shape
        growth = Growth(jnp.zeros_like(memory.lengths), counts, begins=True)
        x, _ = self._through(tokens, growth, memory, lambda x, _: x)
        size = min(length, max(1, MOST_LOGITS // (rows * self.decoder.config.padded_vocab)))
        x = x.reshape(rows, length, -1).astype(self.decoder.dtype)
        pieces = jax.tree.map(lambda array: _pieces(array, size), (x, targets))

        def of(piece: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            x, targets = piece
            logits = constrain(self.decoder.predict(x), None, None, None).astype(jnp.float32)
            found = jax.nn.log_softmax(logits[..., :vocab])
            best, ids = jax.lax.top_k(found, top)
            return jnp.take_along_axis(found, targets[..., None], 2)[..., 0], ids, best

        own, ids, best = (jnp.concatenate(array, 1)[:, :length] for array in jax.lax.map(of, pieces))
        return own, ids, best

    def _through(
        self,
        tokens: Int[Array, "B S"],
        growth: Growth,
        memory: DecoderMemory,
        head: Callable[[Array, Growth], Float[Array, "R ..."]],
    ) -> tuple[Float[Array, "groups R ..."], tuple[Memories, ...]]:
        """What a head makes of the last layer's output, and what layers then remember."""
        groups, stages = memory_groups(memory), self.num_stages
        batch = jax.tree.map(lambda array: vary(array.reshape(groups, -1, *array.shape[1:])), (tokens, growth))
        given = _Group(jnp.arange(groups, dtype=jnp.int32), *batch)
        plan = StagePlan((Partition((1,) * stages, stages),))
        shared = functools.partial(self._shared, memory.room)
        model = Model((Stack(self._enter, shared, self._run),), functools.partial(_head, groups, head))
        result = executor.run(
            forward_only(plan, groups), plan, model, Parameters(({},), {}), given, memory=(memory.layers,)
        )
        found = result.sums["head"]
        if stages > 1:
            # only the last stage has any
            found = vary(all_reduce(found, current().axes("pipe")))
        return found, result.memory[0]

    def _enter(self, outer: PyTree, received: Array | None, rows: _Group) -> Float[Array, "B S E"]:
        def embed(tokens: Array, places: Array) -> Array:
            return self.decoder.embed(tokens, positions=places)

        return by_position(embed, rows.tokens, _places(rows))

    def _shared(self, room: int, rows: _Group) -> LayerInputs:
        inputs = self.decoder.inputs(rows.tokens.shape[1], positions=_places(rows), room=room)
        return dataclasses.replace(inputs, growth=rows.growth)

    def _run(self, weights: PyTree, x: Float[Array, "B S E"], stage: Int[Array, ""], given: Remembering) -> LayerOutput:
        """All layers of a stage."""

        def through(
            sequence: tuple[int, ...], x: Array, memories: tuple[Memories, ...]
        ) -> tuple[Array, tuple[Memories, ...]]:
            found = list(memories)
            for number in sequence:
                x, found[number] = self.layers[number].advance(x, memories[number], given.shared)
            return jax.tree.map(vary, (x, tuple(found)))

        branches: list[Callable] = [functools.partial(through, one) for one in dict.fromkeys(self.sequences)]
        if len(branches) == 1:
            x, memories = branches[0](x, given.memory)
        else:
            kinds = list(dict.fromkeys(self.sequences))
            numbers = jnp.asarray([kinds.index(one) for one in self.sequences], jnp.int32)
            x, memories = jax.lax.switch(numbers[stage], branches, x, given.memory)
        return LayerOutput(x, cache=memories)

    def _last_logits(self, x: Float[Array, "B S E"], growth: Growth) -> Float[Array, "B V"]:
        """Those of what follows the last position of each row that is no padding."""
        x = jnp.take_along_axis(x, jnp.maximum(growth.counts - 1, 0)[:, None, None], 1)
        return constrain(self.decoder.predict(x), None, None, None)[:, 0]


def _head(
    groups: int, make: Callable[[Array, Growth], Array], outer: PyTree, x: Float[Array, "B S E"], rows: _Group
) -> HeadOutput:
    """What `make` makes of the last layer's output, in the place of its group: sums over groups keep them apart."""
    found = make(x, rows.growth).astype(jnp.float32)[None]
    if groups > 1:
        is_own = (jnp.arange(groups) == rows.number).reshape(-1, *(1,) * (found.ndim - 1))
        found = jnp.where(is_own, found, 0)
    return HeadOutput(jnp.float32(0.0), {"head": found})


def _pieces(array: Shaped[Array, "B S ..."], size: int) -> Shaped[Array, "n B size ..."]:
    """An array in runs of so many positions, the last with zeros behind."""
    rows, length = array.shape[:2]
    count = -(-length // size)
    array = jnp.pad(array, ((0, 0), (0, count * size - length), *((0, 0),) * (array.ndim - 2)))
    return jnp.moveaxis(array.reshape(rows, count, size, *array.shape[2:]), 1, 0)


def insert(memory: DecoderMemory, new: DecoderMemory, slots: Int[Array, "A"]) -> DecoderMemory:
    """The memory with new rows in those places; a row whose slot is beyond the last has none, and is left out."""

    def layer(old: Array, new: Array) -> Array:
        layout = jax.typeof(old).sharding.spec

        def local(old: Array, new: Array, slots: Array) -> Array:
            flat = old.reshape(-1, *old.shape[3:]).at[slots].set(new.reshape(-1, *new.shape[3:]), mode="drop")
            return flat.reshape(old.shape)

        return on_each_device(local, (layout, layout, PartitionSpec(None)), layout)(old, new, slots)

    lengths = memory.lengths.at[slots].set(new.lengths, mode="drop")
    return DecoderMemory(jax.tree.map(layer, memory.layers, new.layers), lengths, memory.room)


def memory_groups(memory: DecoderMemory) -> int:
    """Groups that its rows are in."""
    return jax.tree.leaves(memory.layers)[0].shape[0]


def _places(rows: _Group) -> Int[Array, "B S"]:
    """Positions of the tokens; those of padding are not beyond the last one that can be."""
    length = rows.tokens.shape[1]
    new = jnp.minimum(jnp.arange(length, dtype=jnp.int32), jnp.maximum(rows.growth.counts[:, None] - 1, 0))
    return rows.growth.before[:, None] + new


def _of_stage(decoder: Decoder, partition: Partition) -> Iterator[Layer]:
    """The layers that a stage has parameters of, each with values of its own: leading ones, then slot by slot, or kind
    by kind."""
    layout, stack = decoder.config.layout, decoder.stack
    if layout.mixed:
        for kind, part in partition.by_kind.items():
            for slot in range(part.slots_per_chunk):
                yield _slot(getattr(stack.layers, kind), slot)
        return
    for period in stack.leading or ():
        yield from period.layers
    for slot in range(partition.slots_per_chunk):
        yield from _slot(stack.periods, slot).layers


def _sequences(decoder: Decoder, partition: Partition) -> tuple[tuple[int, ...], ...]:
    """Of each stage which of `_of_stage` it runs, in order."""
    layout, found, first = decoder.config.layout, [], 0
    size, leading = len(layout.period), len(layout.leading) * len(layout.period)
    for stage, count in enumerate(partition.lengths):
        if not layout.mixed:
            begin = range(leading) if stage == 0 else ()
            found.append((*begin, *range(leading, leading + count * size)))
            continue
        slots, places = 0, {}
        for kind, part in partition.by_kind.items():
            places[kind] = iter(range(slots, slots + part.slots_per_chunk))
            slots += part.slots_per_chunk
        found.append(tuple(next(places[kind]) for kind in partition.kinds[first : first + count]))
        first += count
    return tuple(found)


def _slot(stacked: ModuleT, number: int) -> ModuleT:
    """One of the modules that are stacked here."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda array: array[number], state))


def _without_layers(decoder: Decoder) -> Decoder:
    graph, state = nnx.split(decoder)
    apart = nnx.merge(graph, state)
    del apart.stack
    return apart

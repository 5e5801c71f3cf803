"""A decoder that goes on from what its layers remember: sequences in parts, at last one token at a time.

Layers are apart here, each with parameters of its own, so that a step reads these and copies none. A pipeline's stage
has all of its layers as one, which the executor runs as it runs a layer of training.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.cache import Growth
from jaxtron.layers.inputs import LayerInputs
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.stack import Layer, Memories
from jaxtron.models.growing import (
    RowGroup,
    SequenceMemory,
    by_position,
    check_steps,
    grouped,
    join_weights,
    last_position,
    memory_groups,
    one_of,
    through_stages,
    without,
)
from jaxtron.models.program import whole
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.rules import constrain
from jaxtron.typing import Array, Float, Int, Shaped

# of a score that are in memory at once: 256 MiB
MOST_LOGITS = 2**26


class Steps(nnx.Module):
    """A decoder whose layers are apart, with their weights whole and in its type; inside `sharding.use(rules)`.

    `partition` says which layers a stage has, in one chunk; inside a pipeline's region each stage makes its own. Along
    `data` and `fsdp` rows are shared out, along `tensor` heads and widths. `UserError` for devices along `context`,
    which would split a token's position, and for chunks.
    """

    def __init__(self, decoder: Decoder, partition: Partition) -> None:
        check_steps(partition)
        self.decoder = without(decoder, "stack")
        self.layers = nnx.List([whole(layer, decoder.dtype) for layer in _of_stage(decoder, partition)])
        join_weights(self)
        self.sequences = _sequences(decoder, partition)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.sequences)

    def start(self, rows: int, room: int, most: int = 1) -> SequenceMemory:
        """What is remembered of sequences that begin; attention has room for so many positions.

        After the beginning at most `most` positions come at a time. Stages work at once where rows are a multiple of
        them, else one after the other.
        """
        groups = self.num_stages if rows % self.num_stages == 0 else 1

        def of(layer: Layer) -> Memories:
            memories = layer.start(rows // groups, room, most, self.decoder.dtype)
            return jax.tree.map(lambda array: jnp.broadcast_to(array, (groups, 1, *array.shape)), memories)

        return SequenceMemory(tuple(map(of, self.layers)), vary(jnp.zeros(rows, jnp.int32)), room)

    def begin(
        self, tokens: Int[Array, "B S"], counts: Int[Array, "B"], room: int, opening: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "B V"], SequenceMemory]:
        """As `advance`, of prompts that begin, of which each row has so many tokens."""
        assert not opening, "a decoder goes on with its prompt"
        return self.advance(tokens, self.start(len(tokens), room), counts, begins=True)

    def advance(
        self,
        tokens: Int[Array, "B S"],
        memory: SequenceMemory,
        counts: Int[Array, "B"] | None = None,
        *,
        begins: bool = False,
    ) -> tuple[Float[Array, "B V"], SequenceMemory]:
        """Logits of what follows these tokens, the vocabulary's padding included, and what is then remembered.

        `counts` of each row's tokens are new (none: all), padding follows them; a row of which none is new stays as it
        is, and its logits mean nothing. `begins`: nothing came before in any row, whatever the memory says. There has
        to be room: what goes beyond it overwrites what was there.
        """
        rows, length = tokens.shape
        before = jnp.zeros_like(memory.lengths) if begins else memory.lengths
        counts = jnp.full((rows,), length, jnp.int32) if counts is None else counts
        logits, layers = self._through(tokens, Growth(before, counts, begins), memory, self._last_logits)
        return logits.reshape(rows, -1), SequenceMemory(layers, before + counts, memory.room)

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
        memory: SequenceMemory,
        head: Callable[[Array, Growth], Float[Array, "R ..."]],
    ) -> tuple[Float[Array, "groups R ..."], tuple[Memories, ...]]:
        """What a head makes of the last layer's output, and what layers then remember."""
        rows = RowGroup(*grouped(memory_groups(memory), tokens, growth))

        def layer(number: int, x: Array, memories: Memories, inputs: LayerInputs) -> tuple[Array, Memories]:
            return self.layers[number].advance(x, memories, inputs)

        def shared(rows: RowGroup) -> LayerInputs:
            inputs = self.decoder.inputs(rows.tokens.shape[1], positions=_places(rows), room=memory.room)
            return dataclasses.replace(inputs, growth=rows.growth)

        return through_stages(
            self.sequences,
            layer,
            enter=self._enter,
            shared=shared,
            head=lambda x, rows: head(x, rows.growth),
            rows=rows,
            memory=memory.layers,
        )

    def _enter(self, rows: RowGroup) -> Float[Array, "B S E"]:
        def embed(tokens: Array, places: Array) -> Array:
            return self.decoder.embed(tokens, positions=places)

        return by_position(embed, rows.tokens, _places(rows))

    def _last_logits(self, x: Float[Array, "B S E"], growth: Growth) -> Float[Array, "B V"]:
        """Those of what follows the last position of each row that is no padding."""
        return constrain(self.decoder.predict(last_position(x, growth)), None, None, None)[:, 0]


def _pieces(array: Shaped[Array, "B S ..."], size: int) -> Shaped[Array, "n B size ..."]:
    """An array in runs of so many positions, the last with zeros behind."""
    rows, length = array.shape[:2]
    count = -(-length // size)
    array = jnp.pad(array, ((0, 0), (0, count * size - length), *((0, 0),) * (array.ndim - 2)))
    return jnp.moveaxis(array.reshape(rows, count, size, *array.shape[2:]), 1, 0)


def _places(rows: RowGroup) -> Int[Array, "B S"]:
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
                yield one_of(getattr(stack.layers, kind), slot)
        return
    for period in stack.leading or ():
        yield from period.layers
    for slot in range(partition.slots_per_chunk):
        yield from one_of(stack.periods, slot).layers


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

"""T5 as it writes: the encoder reads a text once, and the decoder goes on from what its layers keep of it.

What a layer of the decoder keeps are the keys and values of the encoder's output, made when an answer begins, and those
of its own tokens so far. Encoder and decoder pass the same stages of a pipeline, one after the other.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.cache import Growth
from jaxtron.layers.inputs import LayerInputs
from jaxtron.models.growing import (
    RowGroup,
    SequenceMemory,
    by_position,
    check_steps,
    grouped,
    in_groups,
    join_weights,
    last_position,
    memory_groups,
    one_of,
    through_stages,
    without,
)
from jaxtron.models.program import whole
from jaxtron.models.t5.layers import LayerMemory, T5DecoderLayer
from jaxtron.models.t5.model import T5
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float, Int


class T5Steps(nnx.Module):
    """A T5 whose layers are apart, with their weights whole and in its type; inside `sharding.use(rules)`.

    `partitions` say which layers of the encoder and of the decoder a stage has, in one chunk each; inside a pipeline's
    region each stage makes its own. `UserError` for devices along `context`, and for more chunks.
    """

    def __init__(self, t5: T5, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            check_steps(partition)
        self.t5 = without(t5, "encoder", "decoder")
        stacks = (t5.encoder.layers, t5.decoder.layers)
        self.encoder, self.decoder = (
            nnx.List([whole(one_of(stack, slot), t5.dtype) for slot in range(partition.slots_per_chunk)])
            for stack, partition in zip(stacks, partitions, strict=True)
        )
        join_weights(self)
        self.encoder_sequences, self.decoder_sequences = (
            tuple(tuple(range(length)) for length in partition.lengths) for partition in partitions
        )

    def start(self, rows: int, room: int) -> SequenceMemory:
        """What is remembered of so many rows before anything comes, with room for so many tokens of each text and of
        each answer.

        Stages work at once where rows are a multiple of them, else one after the other.
        """
        stages = len(self.decoder_sequences)
        groups = stages if rows % stages == 0 else 1

        def of(layer: T5DecoderLayer) -> LayerMemory:
            memory = layer.start(rows // groups, room, self.t5.dtype)
            return jax.tree.map(lambda array: vary(jnp.broadcast_to(array, (groups, 1, *array.shape))), memory)

        none = vary(jnp.zeros(rows, jnp.int32))
        return SequenceMemory(tuple(map(of, self.decoder)), none, room, none)

    def begin(
        self, tokens: Int[Array, "B S"], counts: Int[Array, "B"], room: int, opening: tuple[int, ...]
    ) -> tuple[Float[Array, "B V"], SequenceMemory]:
        """Logits of what comes after the opening in answers to texts of so many tokens, and what is then remembered.

        A row with no tokens has no answer: its logits mean nothing.
        """
        (first,), counts = opening, vary(counts)
        memory = self.start(len(tokens), room)
        groups = memory_groups(memory)
        encoded = self.encode(tokens, counts, groups)

        def kept(layer: T5DecoderLayer, memory: LayerMemory) -> LayerMemory:
            found = layer.cross.keep(layer.cross.start(len(tokens), room, self.t5.dtype), encoded, counts)
            return memory[0], jax.tree.map(lambda array: vary(in_groups(array, groups)), found)

        layers = tuple(kept(layer, own) for layer, own in zip(self.decoder, memory.layers, strict=True))
        begun = replace(memory, layers=layers, sources=counts)
        return self.advance(jnp.full_like(tokens[:, :1], first), begun, jnp.minimum(counts, 1))

    def advance(
        self, tokens: Int[Array, "B 1"], memory: SequenceMemory, counts: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B V"], SequenceMemory]:
        """Logits of what follows a further token of each answer, the vocabulary's padding included, and what is then
        remembered.

        A row that has no token (`counts` 0; none: all have one) stays as it is, and its logits mean nothing.
        """
        rows, sources = len(tokens), memory.sources
        counts = jnp.ones((rows,), jnp.int32) if counts is None else counts
        growth = Growth(memory.lengths, counts)
        groups = RowGroup(*grouped(memory_groups(memory), tokens, growth, sources))

        def layer(number: int, x: Array, memory: LayerMemory, inputs: LayerInputs) -> tuple[Array, LayerMemory]:
            return self.decoder[number].advance(x, memory, inputs)

        def shared(rows: RowGroup) -> LayerInputs:
            bias = self.t5.decoder_distances()
            return LayerInputs(distance_bias=bias, growth=rows.growth, memory_counts=rows.sources)

        def head(x: Array, rows: RowGroup) -> Float[Array, "B V"]:
            return constrain(self.t5.logits(last_position(x, rows.growth)), None, None, None)[:, 0]

        logits, layers = through_stages(
            self.decoder_sequences,
            layer,
            enter=lambda rows: by_position(self._embed, rows.tokens),
            shared=shared,
            head=head,
            rows=groups,
            memory=memory.layers,
        )
        return logits.reshape(rows, -1), replace(memory, layers=layers, lengths=memory.lengths + counts)

    def encode(self, tokens: Int[Array, "B S"], counts: Int[Array, "B"], groups: int = 1) -> Float[Array, "B T E"]:
        """What the decoder attends to of texts of so many tokens, whole on every part of `tensor`, whose parts the
        length is filled up to; rows go through the stages in so many groups."""
        rows, length = tokens.shape
        tokens = jnp.pad(tokens, ((0, 0), (0, -length % current().parts("tensor"))))
        given = RowGroup(*grouped(groups, tokens, Growth(jnp.zeros_like(counts), counts, begins=True)))

        def layer(number: int, x: Array, _memory: None, inputs: LayerInputs) -> tuple[Array, None]:
            return self.encoder[number](x, inputs), None

        def shared(rows: RowGroup) -> LayerInputs:
            is_text = rows.growth.is_new(rows.tokens.shape[1]).astype(jnp.int32)
            return LayerInputs(segments=is_text, distance_bias=self.t5.encoder_distances())

        def head(x: Array, _rows: RowGroup) -> Float[Array, "B T E"]:
            return constrain(self.t5.encoded(x, LayerInputs()), "batch", "full_seq", "embed")

        encoded, _ = through_stages(
            self.encoder_sequences,
            layer,
            enter=lambda rows: self._embed(rows.tokens),
            shared=shared,
            head=head,
            rows=given,
        )
        return encoded.reshape(rows, *encoded.shape[2:]).astype(self.t5.dtype)

    def _embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S E"]:
        return self.t5.embed(tokens, LayerInputs())

"""T5 as it is computed: two stacks, of which the second attends to what left the first.

The stream has what both stacks make, and the biases by distance of the stack at hand: these are made of a table in no
stack where a stack is entered, and go from layer to layer and stage to stage with it, so that their gradients from all
layers come back along the same way.
"""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from jaxtron.data.batch import SECOND_SEQUENCE, SEQUENCE
from jaxtron.layers.inputs import LayerInputs, row_keys
from jaxtron.models.adapters import drops
from jaxtron.models.decoder import recompute
from jaxtron.models.program import Microbatch, Parts, Program, whole
from jaxtron.models.t5.attention_backends import attention_backends
from jaxtron.models.t5.batch import TOKENS, T5Batch, of_tokens
from jaxtron.models.t5.config import T5Config
from jaxtron.models.t5.data import open_data, samples_of_text
from jaxtron.models.t5.decode import T5Steps
from jaxtron.models.t5.model import T5
from jaxtron.models.t5.text import answer_text
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Outer, Stack
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.rules import constrain
from jaxtron.typing import Array, Float, Int, Key, PyTree

# what the encoder made, what the decoder made, and what attention of the stack at hand adds by distance
ENCODED, DECODED, DISTANCES = "encoded", "decoded", "distances"
Stream = dict[str, Array]


def model(parts: Parts[T5], key: Key[Array, ""] | None) -> Model:
    """Both stacks and the head."""
    t5 = parts.abstract
    config = t5.config
    key = key if config.is_random or drops(t5) else None
    # sites of what is dropped outside of layers: after those of all layers
    outside = config.encoder_layers + config.decoder_layers

    def encoder_inputs(microbatch: Microbatch[T5Batch]) -> LayerInputs:
        keys = None if key is None else row_keys(key, microbatch.rows)
        return LayerInputs(keys=keys, segments=microbatch.batch.segments)

    def decoder_inputs(microbatch: Microbatch[T5Batch]) -> LayerInputs:
        inputs, batch = encoder_inputs(microbatch), microbatch.batch
        return replace(inputs, segments=batch.decoder_segments, memory_segments=batch.segments)

    def encode(outer: Outer, _stream: None, microbatch: Microbatch[T5Batch]) -> Stream:
        module, batch = parts.outer(outer), microbatch.batch
        encoded = module.embed(batch.tokens, encoder_inputs(microbatch).fold(outside))
        # nothing yet, as large as it will be
        shape = (*batch.decoder_tokens.shape, config.hidden_size)
        decoded = constrain(vary(jnp.zeros(shape, t5.dtype)), "batch", "seq", "embed")
        return {ENCODED: encoded, DECODED: decoded, DISTANCES: module.encoder_distances()}

    def decode(outer: Outer, stream: Stream | None, microbatch: Microbatch[T5Batch]) -> Stream:
        assert stream is not None
        module, inputs = parts.outer(outer), decoder_inputs(microbatch)
        encoded = module.encoded(stream[ENCODED], inputs.fold(outside + 1))
        decoded = module.embed(microbatch.batch.decoder_tokens, inputs.fold(outside + 2))
        return {ENCODED: encoded, DECODED: decoded, DISTANCES: module.decoder_distances()}

    def encoder_layer(weights: PyTree, stream: Stream, number: Int[Array, ""], inputs: LayerInputs) -> LayerOutput:
        inputs = replace(inputs.fold(number), distance_bias=stream[DISTANCES])
        encoded = whole(parts.layer(0, weights), t5.dtype)(stream[ENCODED], inputs)
        return LayerOutput({**stream, ENCODED: encoded})

    def decoder_layer(weights: PyTree, stream: Stream, number: Int[Array, ""], inputs: LayerInputs) -> LayerOutput:
        inputs = replace(inputs.fold(config.encoder_layers + number), distance_bias=stream[DISTANCES])
        decoded = whole(parts.layer(1, weights), t5.dtype)(stream[DECODED], stream[ENCODED], inputs)
        return LayerOutput({**stream, DECODED: decoded})

    def head(outer: Outer, stream: Stream, microbatch: Microbatch[T5Batch]) -> HeadOutput:
        batch, inputs = microbatch.batch, decoder_inputs(microbatch).fold(outside + 3)
        loss, nll = parts.outer(outer).score(stream[DECODED], batch.targets, batch.weights, inputs)
        return HeadOutput(loss, {"loss": nll})

    of_layer = partial(recompute.layer, config)
    stacks = (
        Stack(encode, encoder_inputs, of_layer(encoder_layer)),
        Stack(decode, decoder_inputs, of_layer(decoder_layer)),
    )
    return Model(stacks, head)


def lengths(config: T5Config, length: int) -> dict[str, int]:
    """Of the encoder's sequences and of the decoder's."""
    return {SEQUENCE: length, SECOND_SEQUENCE: config.decoder_tokens(length)}


def logits(parts: Parts[T5], outer: Outer, stream: Stream) -> Float[Array, "B S V"]:
    """Logits of what follows each of the decoder's tokens, padding of the vocabulary included."""
    return parts.outer(outer).logits(stream[DECODED])


PROGRAM = Program(
    batch=T5Batch,
    losses={"loss": TOKENS},
    build=T5,
    model=model,
    lengths=lengths,
    source=samples_of_text,
    open_data=open_data,
    logits=logits,
    token_rows=of_tokens,
    attention=attention_backends,
    steps=T5Steps,
    answers=answer_text,
)

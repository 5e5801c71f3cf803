"""The stack of a BERT's layers, as a pipeline runs it, whatever heads are on it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtron.layers.inputs import LayerInputs
from jaxtron.models.adapters import drops
from jaxtron.models.bert.model import BertEncoder
from jaxtron.models.decoder import recompute
from jaxtron.models.program import Microbatch, Parts, whole
from jaxtron.pipeline.model import LayerOutput, Outer, Stack
from jaxtron.typing import Array, Float, Int, Key, PyTree


class Texts(NamedTuple):
    """What an encoder reads: tokens, their kinds, and segments, which keep padding apart."""

    tokens: Int[Array, "B S"]
    token_types: Int[Array, "B S"]
    segments: Int[Array, "B S"]


# (microbatch, key of dropout) -> one key for each of its texts
TextKeys = Callable[[Microbatch[Any], Key[Array, ""]], Key[Array, "B"]]


def encoder_stack(
    parts: Parts[Any], key: Key[Array, ""] | None, texts: Callable[[Any], Texts], keys: TextKeys
) -> tuple[Stack, Callable[[Microbatch[Any]], LayerInputs]]:
    """The stack, and what its layers read beside the stream: with keys where a step drops something."""
    bert: BertEncoder = parts.abstract
    config = bert.config
    key = key if config.is_random or drops(bert) else None

    def shared(microbatch: Microbatch[Any]) -> LayerInputs:
        own = None if key is None else keys(microbatch, key)
        return LayerInputs(keys=own, segments=texts(microbatch.batch).segments)

    def enter(outer: Outer, _stream: None, microbatch: Microbatch[Any]) -> Float[Array, "B S E"]:
        read, embedding = texts(microbatch.batch), whole(parts.outer(outer).embedding, bert.dtype)
        # the site after those of the layers
        return embedding(read.tokens, read.token_types, shared(microbatch).fold(config.num_layers))

    def layer(weights: PyTree, x: Float[Array, "B S E"], number: Int[Array, ""], inputs: LayerInputs) -> LayerOutput:
        return LayerOutput(whole(parts.layer(0, weights), bert.dtype)(x, inputs.fold(number)))

    return Stack(enter, shared, recompute.layer(config, layer)), shared

"""BERT as it is computed: one stack over all tokens, and two losses, each a mean of its own."""

import jax.numpy as jnp

from jaxtron.layers.inputs import LayerInputs, row_keys
from jaxtron.models.adapters import drops
from jaxtron.models.bert.batch import MASKED, PAIRS, BertBatch
from jaxtron.models.bert.data import open_data, samples_of_text
from jaxtron.models.bert.model import Bert, choice_loss
from jaxtron.models.decoder import recompute
from jaxtron.models.encoder.attention_backends import attention_backends
from jaxtron.models.program import Microbatch, Parts, Program, whole
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Outer, Stack
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int, Key, PyTree

Sums = dict[str, Float[Array, ""]]


def model(parts: Parts[Bert], key: Key[Array, ""] | None) -> Model:
    """Embedding, layers, norm, and both heads."""
    bert = parts.abstract
    config = bert.config
    key = key if config.is_random or drops(bert) else None

    def shared(microbatch: Microbatch[BertBatch]) -> LayerInputs:
        keys = None if key is None else row_keys(key, microbatch.rows)
        return LayerInputs(keys=keys, segments=microbatch.batch.segments)

    def enter(outer: Outer, _stream: None, microbatch: Microbatch[BertBatch]) -> Float[Array, "B S E"]:
        batch, embedding = microbatch.batch, whole(parts.outer(outer).embedding, bert.dtype)
        # the site after those of the layers
        return embedding(batch.tokens, batch.token_types, shared(microbatch).fold(config.num_layers))

    def layer(weights: PyTree, x: Float[Array, "B S E"], number: Int[Array, ""], inputs: LayerInputs) -> LayerOutput:
        return LayerOutput(whole(parts.layer(0, weights), bert.dtype)(x, inputs.fold(number)))

    def head(outer: Outer, x: Float[Array, "B S E"], microbatch: Microbatch[BertBatch]) -> HeadOutput:
        module, batch = parts.outer(outer), microbatch.batch
        x = module.normed(x)
        loss, nll = module.predict_masked(x, batch.targets, batch.weights)
        wrong, right = jnp.float32(0), jnp.float32(0)
        if config.pairs != "none":
            # every device of a row has the whole of this: it counts its share
            share = batch.pair_weights / current().parts("context")
            wrong, right = choice_loss(module.pair_logits(x), batch.is_swapped, share)
        return HeadOutput(loss + wrong, {"masked": nll, "pairs": wrong, "pair_accuracy": right})

    return Model((Stack(enter, shared, recompute.layer(config, layer)),), head)


def logits(parts: Parts[Bert], outer: Outer, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
    """Logits of the token at each place, padding of the vocabulary included."""
    module = parts.outer(outer)
    return module.logits(module.normed(x))


PROGRAM = Program(
    batch=BertBatch,
    losses={"masked": MASKED, "pairs": PAIRS},
    metrics={"pair_accuracy": PAIRS},
    build=Bert,
    model=model,
    source=samples_of_text,
    open_data=open_data,
    attention=attention_backends,
)

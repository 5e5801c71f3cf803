"""BERT as it is computed: one stack over all tokens, and two losses, each a mean of its own."""

from collections.abc import Mapping

import jax.numpy as jnp

from jaxtron.layers.inputs import row_keys
from jaxtron.models.bert.batch import MASKED, PAIRS, BertBatch, of_tokens
from jaxtron.models.bert.config import BertConfig
from jaxtron.models.bert.data import open_data, samples_of_text
from jaxtron.models.bert.model import Bert, choice_loss
from jaxtron.models.bert.stack import Texts, encoder_stack
from jaxtron.models.encoder.attention_backends import attention_backends
from jaxtron.models.program import Microbatch, Parts, Program
from jaxtron.pipeline.model import HeadOutput, Model, Outer
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Key


def model(parts: Parts[Bert], key: Key[Array, ""] | None) -> Model:
    """Embedding, layers, norm, and both heads."""
    config = parts.abstract.config

    def texts(batch: BertBatch) -> Texts:
        return Texts(batch.tokens, batch.token_types, batch.segments)

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

    stack, _ = encoder_stack(parts, key, texts, lambda microbatch, key: row_keys(key, microbatch.rows))
    return Model((stack,), head)


def figures(_config: BertConfig, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Of a validation: pairs that were told right."""
    return {"pair_accuracy": sums["pair_accuracy"] / counts[PAIRS]} if counts[PAIRS] else {}


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
    figures=figures,
    logits=logits,
    token_rows=of_tokens,
)

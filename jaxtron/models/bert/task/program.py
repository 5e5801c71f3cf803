"""A BERT with a task as it is computed: the layers of every text, and one product of each pooled token, or of each."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.inputs import dropout, row_keys
from jaxtron.models.bert.model import BertEncoder, ChoiceHead, Pooler, choice_loss
from jaxtron.models.bert.stack import Texts, encoder_stack
from jaxtron.models.bert.task.answer import AnswerHead, answer_sums
from jaxtron.models.bert.task.batch import EXAMPLES, TEXTS, TaskBatch
from jaxtron.models.bert.task.config import BertTaskConfig
from jaxtron.models.bert.task.data import examples_of_text, open_data
from jaxtron.models.encoder.attention_backends import attention_backends
from jaxtron.models.program import BuildContext, Microbatch, Parts, Program, whole
from jaxtron.pipeline.model import HeadOutput, Model, Outer
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int, Key


class BertTask(BertEncoder):
    """A BERT with one head, whose parameters are new; the others have the names that they have in pretraining."""

    def __init__(self, config: BertTaskConfig, context: BuildContext, rngs: nnx.Rngs) -> None:
        super().__init__(config, context, rngs)
        finds = config.task == "answer"
        self.answer = AnswerHead(config, rngs) if finds else None
        self.pooler = None if finds else Pooler(config, rngs)
        self.choice = None if finds else ChoiceHead(config, config.outputs, rngs)


def model(parts: Parts[BertTask], key: Key[Array, ""] | None) -> Model:
    """Embedding, layers, norm and head; texts of an example are rows."""
    bert = parts.abstract
    config = bert.config
    assert isinstance(config, BertTaskConfig)

    def texts(batch: TaskBatch) -> Texts:
        read = (batch.tokens, batch.token_types, batch.segments)
        return Texts(*(array.reshape(-1, array.shape[-1]) for array in read))

    def keys(microbatch: Microbatch[TaskBatch], key: Key[Array, ""]) -> Key[Array, "B"]:
        own = row_keys(key, microbatch.rows)
        each = jax.vmap(lambda own: jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(config.texts)))(own)
        return each.reshape(-1)

    stack, shared = encoder_stack(parts, key, texts, keys)

    def head(outer: Outer, x: Float[Array, "B S E"], microbatch: Microbatch[TaskBatch]) -> HeadOutput:
        module, batch = parts.outer(outer), microbatch.batch
        # every device of an example has the whole of what is told of it: it counts its share
        share = batch.weights / current().parts("context")
        sums = dict.fromkeys(("overlap", "wanted", "told", "hits"), vary(jnp.zeros((), jnp.float32)))
        if module.answer is not None:
            logits = whole(module.answer, bert.dtype)(module.normed(x))
            found = answer_sums(logits, texts(batch), batch.label, share, config.answer_tokens)
            return HeadOutput(
                found.loss, sums | {"task": found.loss, "accuracy": found.exact, "overlap": found.overlap}
            )
        assert module.pooler is not None and module.choice is not None
        pooled = whole(module.pooler, bert.dtype)(module.normed(x))
        # the site after that of the embedding
        pooled = dropout(pooled, config.dropout, shared(microbatch).fold(config.num_layers + 1), "batch", "embed")
        logits = whole(module.choice, bert.dtype)(pooled)
        logits = logits.reshape(len(batch.label), -1) if config.task == "choose" else logits
        loss, right = choice_loss(logits, batch.label, share)
        # of two classes alone the second is told by itself
        if config.task == "classify" and config.outputs == 2:
            sums |= _of_second(logits, batch.label, share)
        return HeadOutput(loss, sums | {"task": loss, "accuracy": right})

    return Model((stack,), head)


def _of_second(
    logits: Float[Array, "B choices"], label: Int[Array, "B"], weights: Float[Array, "B"]
) -> dict[str, Float[Array, ""]]:
    """Examples of the second class, those that are taken for it, and those of these that are."""
    told, wanted = jax.lax.stop_gradient(logits.argmax(-1) == 1), label == 1
    found = {"wanted": wanted, "told": told, "hits": told & wanted}
    return {name: (weights * counted).sum() for name, counted in found.items()}


def figures(config: BertTaskConfig, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Of a validation: accuracy, of two classes the F1 of the second; of answers the exact ones, and their mean F1."""
    if config.task == "answer":
        return {"exact": sums["accuracy"] / counts[EXAMPLES], "f1": sums["overlap"] / counts[EXAMPLES]}
    found = {"accuracy": sums["accuracy"] / counts[EXAMPLES]}
    if config.task == "classify" and config.outputs == 2:
        both = sums["told"] + sums["wanted"]
        found["f1"] = 2 * sums["hits"] / both if both else 0.0
    return found


PROGRAM = Program(
    batch=TaskBatch,
    losses={"task": EXAMPLES},
    metrics=dict.fromkeys(("accuracy", "overlap", "wanted", "told", "hits"), EXAMPLES),
    build=BertTask,
    model=model,
    lengths=lambda config, length: {TEXTS: config.texts, "seq": length},
    source=examples_of_text,
    open_data=open_data,
    attention=attention_backends,
    figures=figures,
)

"""BERT: an encoder, a head that predicts masked tokens, and one for what its first token says of the whole."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.linear import Linear
from jaxtron.layers.loss import Sums, cross_entropy
from jaxtron.layers.positions import local_positions
from jaxtron.models.bert.config import BertConfig
from jaxtron.models.encoder.attention_backends import ENCODER, attention_backends, attention_spec
from jaxtron.models.encoder.heads import MaskedHead
from jaxtron.models.encoder.layer import EncoderEmbedding, EncoderLayers, make_core, make_norm
from jaxtron.models.program import BuildContext, whole
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, Float, Int


class BertEncoder(nnx.Module):
    """The layers, what is before them, and the norm after them: of all models that have heads on them."""

    def __init__(self, config: BertConfig, context: BuildContext, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, context.dtype
        (partition,) = context.partitions.values()
        backends = context.attention
        if backends is None:
            rules = current()
            backends = attention_backends(
                config, self.dtype, device_kind=rules.device_kind, parts=rules.parts("context")
            )
        core = make_core(config, backends[ENCODER].implementation, attention_spec(config))
        self.embedding = EncoderEmbedding(config, rngs)
        self.encoder = EncoderLayers(config, core, partition, rngs)
        self.final_norm = make_norm(config, rngs) if config.norm_placement == "pre" else None

    def normed(self, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        """What the heads read, from the last layer's output."""
        return x if self.final_norm is None else self.final_norm(x)


class Bert(BertEncoder):
    """What is before and after the layers, and these; `program.py` puts them together."""

    def __init__(self, config: BertConfig, context: BuildContext, rngs: nnx.Rngs) -> None:
        super().__init__(config, context, rngs)
        self.masked = MaskedHead(config, rngs)
        self.pooler = Pooler(config, rngs) if config.pairs != "none" else None
        self.pairs = ChoiceHead(config, 2, rngs) if config.pairs != "none" else None

    def predict_masked(
        self, x: Float[Array, "B S E"], targets: Int[Array, "B S"], weights: Float[Array, "B S"]
    ) -> Sums:
        """Weighted sums of the loss of tokens, and to report; `x` is normed."""
        head, table = whole(self.masked, self.dtype), whole(self.embedding, self.dtype).tokens.table[...]
        return cross_entropy(head(x), table, targets, weights, self.config.vocab_size, 0.0, head.bias[...])

    def logits(self, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
        """Logits of the token at each place, split over the vocabulary, of its padding too; `x` is normed."""
        head, table = whole(self.masked, self.dtype), whole(self.embedding, self.dtype).tokens.table[...]
        x = constrain(head(x), "batch", "full_seq", "embed")
        contracted = (((2,), (1,)), ((), ()))
        products = jax.lax.dot_general(x, table, contracted, out_sharding=spec("batch", "full_seq", "vocab"))
        return products + head.bias[...].astype(products.dtype)

    def pair_logits(self, x: Float[Array, "B S E"]) -> Float[Array, "B choices"]:
        """Logits in float32 of what the parts of each row are to each other, the same on all devices of a row; `x` is
        normed."""
        assert self.pooler is not None and self.pairs is not None
        return whole(self.pairs, self.dtype)(whole(self.pooler, self.dtype)(x))


class Pooler(nnx.Module):
    """tanh of a product of the first token of each row, wherever that lies."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.dense = Linear({"embed": size}, {"latent": size}, bias=True, std=config.initial_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B E"]:
        first = first_token(x)[:, None]
        return jnp.tanh(self.dense(first, "batch", "full_seq", "latent", inputs=LayerInputs()))[:, 0]


class ChoiceHead(nnx.Module):
    """Logits of a few choices, from what is known of a row."""

    def __init__(self, config: BertConfig, choices: int, rngs: nnx.Rngs) -> None:
        inputs = {"embed": config.hidden_size}
        # of a choice among texts the softmax ignores what all have
        has_bias = choices > 1
        self.dense = Linear(inputs, {"choice": choices}, bias=has_bias, std=config.initial_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B E"]) -> Float[Array, "B choices"]:
        return self.dense(x[:, None], "batch", "full_seq", None, inputs=LayerInputs())[:, 0].astype(jnp.float32)


def first_token(x: Float[Array, "B S E"]) -> Float[Array, "B E"]:
    """What the stream has of each row's first token, on every device that has a part of the row."""
    is_first = (local_positions(x.shape[1]) == 0).astype(x.dtype)
    # a sum of which one summand is not 0: of parts of a sequence only the first has it
    found = constrain((x * is_first[:, None]).sum(1), "batch", "embed")
    # each device counts its share of what becomes of it, and shares are summed in the backward
    return vary(jax.lax.psum(found, current().axes("context"))) if current().parts("context") > 1 else found


def choice_loss(
    logits: Float[Array, "B choices"], choice: Int[Array, "B"], weights: Float[Array, "B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over the rows of the cross-entropy, and of rows whose likeliest choice is right."""
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, choice[:, None], 1)[:, 0]
    is_right = jax.lax.stop_gradient(logits.argmax(-1) == choice)
    return (weights * nll).sum(), (weights * is_right).sum()

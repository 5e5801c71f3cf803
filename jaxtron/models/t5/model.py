"""T5: an embedding that both stacks share, the stacks with their biases by distance and norms, and the head."""

import jax
from flax import nnx

from jaxtron.layers.embedding import Embedding
from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import normal
from jaxtron.layers.loss import LogitForm, Sums, cross_entropy
from jaxtron.layers.relations.distance import DistanceBias
from jaxtron.models.program import BuildContext, whole
from jaxtron.models.t5.attention_backends import attention_backends
from jaxtron.models.t5.config import T5Config
from jaxtron.models.t5.layers import T5Decoder, T5Encoder, make_norm
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, Float, Int


class T5(nnx.Module):
    """What is before, between and after the layers, and these; `program.py` puts them together."""

    def __init__(self, config: T5Config, context: BuildContext, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, context.dtype
        backends = context.attention
        if backends is None:
            rules = current()
            backends = attention_backends(
                config, self.dtype, device_kind=rules.device_kind, parts=rules.parts("context")
            )
        std = config.initial_factor
        self.embedding = Embedding(config.padded_vocab, config.hidden_size, num_positions=None, std=std, rngs=rngs)
        encoder, decoder = (context.partitions[f"{name}/layers"] for name in ("encoder", "decoder"))
        self.encoder = T5Encoder(config, backends, encoder, rngs)
        self.decoder = T5Decoder(config, backends, decoder, rngs)
        self.encoder_distances = _distances(config, rngs, causal=False)
        self.decoder_distances = _distances(config, rngs, causal=True)
        self.encoder_norm, self.decoder_norm = make_norm(config, rngs), make_norm(config, rngs)
        self.head = None if config.tied_head else T5Head(config, rngs)

    def embed(self, tokens: Int[Array, "B S"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        """What enters a stack, split over the sequence."""
        return self._drop(whole(self.embedding, self.dtype)(tokens), inputs)

    def encoded(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        """What the decoder attends to, of what left the encoder's layers."""
        return self._drop(self.encoder_norm(x), inputs)

    def score(
        self, x: Float[Array, "B S E"], targets: Int[Array, "B S"], weights: Float[Array, "B S"], inputs: LayerInputs
    ) -> Sums:
        """Weighted sums over the tokens of the loss and to report, of what left the decoder's layers."""
        x = self._drop(self.decoder_norm(x), inputs)
        return cross_entropy(x, self._table(), targets, weights, self.config.vocab_size, 0.0, None, self._form)

    def logits(self, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
        """Logits of what follows each token, split over the vocabulary and with its padding."""
        x = constrain(self.decoder_norm(x), "batch", "full_seq", "embed")
        contracted = (((2,), (1,)), ((), ()))
        products = jax.lax.dot_general(x, self._table(), contracted, out_sharding=spec("batch", "full_seq", "vocab"))
        return self._form(products, None)

    @property
    def _form(self) -> LogitForm:
        return LogitForm(self.config.hidden_size**-0.5 if self.config.tied_head else 1.0)

    def _table(self) -> Float[Array, "V E"]:
        module = self.embedding if self.head is None else self.head
        return whole(module, self.dtype).table[...]

    def _drop(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        return constrain(dropout(x, self.config.dropout, inputs, "batch", "seq", "embed"), "batch", "seq", "embed")


def _distances(config: T5Config, rngs: nnx.Rngs, *, causal: bool) -> DistanceBias:
    return DistanceBias(
        config.num_heads,
        num_buckets=config.num_buckets,
        max_distance=config.max_distance,
        causal=causal,
        std=config.initial_factor * config.hidden_size**-0.5,
        rngs=rngs,
    )


class T5Head(nnx.Module):
    """An output table of its own, oriented like the embedding's."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs) -> None:
        shape = (config.padded_vocab, config.hidden_size)
        self.table = parameter(rngs, normal(config.initial_factor), shape, axes=("vocab", "embed"), role="embedding")

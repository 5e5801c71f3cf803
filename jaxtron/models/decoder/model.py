"""A decoder-only language model: embedding, stack of layers, final norm, head and loss."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.selection import Backend
from jaxtron.layers.embedding import Embedding
from jaxtron.layers.inputs import LayerInputs, RotaryKey, Tables, dropout
from jaxtron.layers.linear import normal
from jaxtron.layers.loss import LogitForm, Sums, cross_entropy
from jaxtron.layers.positions import local_positions, rotary_tables
from jaxtron.models.decoder.attention_backends import attention_backends
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.layers import make_norm
from jaxtron.models.decoder.pattern import layer_kinds
from jaxtron.models.decoder.stack import Stack
from jaxtron.models.program import whole
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, DTypeLike, Float, Int, Key


class Decoder(nnx.Module):
    """What is before and after the layers of a pattern, and these; `program.py` puts them together.

    Build and run it inside `sharding.use(rules)`. Matrices and activations are in `dtype`, parameters in float32.
    `attention` has the backend of each kind of attention (none: selected for short sequences on the rules' devices).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        partition: Partition | None = None,
        attention: Mapping[str, Backend[Implementation]] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        positions = config.max_positions if config.position == "learned" else None
        self.embedding = Embedding(
            config.padded_vocab,
            config.hidden_size,
            num_positions=positions,
            std=config.initial_std,
            rngs=rngs,
            multiplier=config.embedding_multiplier,
        )
        self.embedding_norm = make_norm(config, config.hidden_size, rngs) if config.embedding_norm else None
        if attention is None:
            rules = current()
            attention = attention_backends(
                config, self.dtype, device_kind=rules.device_kind, parts=rules.parts("context")
            )
        self.stack = Stack(config, partition or one_partition(config), attention, rngs)
        self.final_norm = make_norm(config, config.hidden_size, rngs)
        self.head = None if config.tied_head else Head(config, rngs)
        self.head_bias = (
            parameter(rngs, initializers.zeros, (config.padded_vocab,), axes=("vocab",), role="bias")
            if config.head_bias
            else None
        )

    def inputs(
        self,
        length: int,
        keys: Key[Array, "B"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        segments: Int[Array, "B S"] | None = None,
        room: int | None = None,
    ) -> LayerInputs:
        """What all layers read beside their input; `keys` (one a row) turn dropout on.

        `positions` are places of the tokens (none: those in the sequence), `segments` their documents (none: one),
        `room` is how long their sequence may become (none: it is all here).
        """
        room = length * current().parts("context") if room is None else room
        return LayerInputs(rotary=self._rotary(length, positions, room), keys=keys, segments=segments)

    def embed(
        self,
        tokens: Int[Array, "B S"],
        keys: Key[Array, "B"] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S E"]:
        """The first layer's input, split over the sequence."""
        config = self.config
        x = whole(self.embedding, self.dtype)(tokens, positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        # the site after those of the layers: the embedding's own dropout
        inputs = LayerInputs(keys=keys).fold(len(config.layout.leading) + config.layout.looped)
        return dropout(x, config.dropout, inputs, "batch", "seq", "embed")

    def score(self, x: Float[Array, "B S E"], targets: Int[Array, "B S"], weights: Float[Array, "B S"]) -> Sums:
        """Weighted sums over the tokens of the training loss and of the negative log-likelihood, from the last layer's
        output."""
        config = self.config
        x = self.final_norm(x)
        return cross_entropy(
            x, self._head_table(), targets, weights, config.vocab_size, config.z_loss, self._head_bias(), self._form
        )

    def predict(self, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
        """Logits from the last layer's output, split over the vocabulary and without its padding masked."""
        x = constrain(self.final_norm(x), "batch", "full_seq", "embed")
        contracted = (((2,), (1,)), ((), ()))
        products = jax.lax.dot_general(
            x, self._head_table(), contracted, out_sharding=spec("batch", "full_seq", "vocab")
        )
        return self._form(products, self._head_bias())

    @property
    def _form(self) -> LogitForm:
        return LogitForm(self.config.logit_scale, self.config.logit_soft_cap)

    def _head_bias(self) -> Float[Array, "V"] | None:
        return None if self.head_bias is None else self.head_bias[...]

    def _head_table(self) -> Float[Array, "V E"]:
        return (
            whole(self.embedding, self.dtype).table[...]
            if self.head is None
            else whole(self.head, self.dtype).table[...]
        )

    def _rotary(self, length: int, positions: Int[Array, "B S"] | None, room: int) -> dict[RotaryKey, Tables]:
        config = self.config
        if config.position != "rotary":
            return {}
        places = local_positions(length) if positions is None else positions
        heads = (kind.heads(config) for kind in config.kinds if kind.heads is not None)
        keys = sorted({(one.rotary, one.rotated) for one in heads})
        return {(name, size): rotary_tables(getattr(config, name), size, places, room) for name, size in keys}


def one_partition(config: ModelConfig) -> Partition:
    """All layers on one stage."""
    return Partition((config.layout.looped,), kinds=layer_kinds(config.layout))


class Head(nnx.Module):
    """An output table of its own, oriented like the embedding's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        shape = (config.padded_vocab, config.hidden_size)
        self.table = parameter(rngs, normal(config.initial_std), shape, axes=("vocab", "embed"), role="embedding")

"""METRO-LM: a smaller encoder that fills masked places, and a larger one that finds and mends what it put there."""

import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.linear import Linear
from jaxtron.layers.loss import Sums, cross_entropy
from jaxtron.layers.positions import local_positions
from jaxtron.layers.relations.distance import DistanceBias, signed_buckets
from jaxtron.models.encoder.attention_backends import attention_spec
from jaxtron.models.encoder.heads import MaskedHead
from jaxtron.models.encoder.layer import EncoderEmbedding, EncoderLayers, make_core, make_norm
from jaxtron.models.encoder.settings import EncoderSettings
from jaxtron.models.metro.attention_backends import AUXILIARY, MAIN, attention_backends
from jaxtron.models.metro.config import MetroConfig
from jaxtron.models.metro.sampling import draw
from jaxtron.models.program import BuildContext, whole
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Bool, Float, Int


class Metro(nnx.Module):
    """Both encoders and their heads, and the embedding that they share; `program.py` puts them together."""

    def __init__(self, config: MetroConfig, context: BuildContext, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, context.dtype
        backends = context.attention
        if backends is None:
            rules = current()
            backends = attention_backends(
                config, self.dtype, device_kind=rules.device_kind, parts=rules.parts("context")
            )
        self.embedding = EncoderEmbedding(config, rngs)

        def encoder(name: str, settings: EncoderSettings) -> EncoderLayers:
            core = make_core(settings, backends[name].implementation, attention_spec(settings))
            return EncoderLayers(settings, core, context.partitions[f"{name}/layers"], rngs)

        self.auxiliary = encoder(AUXILIARY, config.auxiliary)
        self.main = encoder(MAIN, config)
        self.auxiliary_end = EncoderEnd(config, rngs)
        self.main_end = EncoderEnd(config, rngs)
        # 0 at first: nothing is thought to be replaced or not
        self.detection = Linear({"embed": config.hidden_size}, {"choice": 1}, bias=True, std=0.0, rngs=rngs)

    def score(
        self, end: "EncoderEnd", x: Float[Array, "B P E"], targets: Int[Array, "B P"], weights: Float[Array, "B P"]
    ) -> Sums:
        """Weighted sums of the loss of tokens at these places, and to report, of what an encoder has there."""
        head, table = whole(end.masked, self.dtype), self._table()
        return cross_entropy(head(x), table, targets, weights, self.config.vocab_size, 0.0, head.bias[...])

    def draw(self, x: Float[Array, "B P E"], inputs: LayerInputs) -> Int[Array, "B P"]:
        """A token for each place, as the smaller encoder predicts it; it has no gradient."""
        head = whole(self.auxiliary_end.masked, self.dtype)
        return draw(head(x), self._table(), head.bias[...], self.config.vocab_size, inputs)

    def detect(self, x: Float[Array, "B S E"]) -> Float[Array, "B S"]:
        """Logits in float32 of a token being replaced, split over the sequence."""
        # on one tensor part a sequence that is not named as split is multiplied as one matrix
        part = "seq" if current().parts("tensor") > 1 else "full_seq"
        read = constrain(x, "batch", part, "embed")
        logits = whole(self.detection, self.dtype)(read, "batch", part, None, inputs=LayerInputs())
        return constrain(logits[..., 0].astype(jnp.float32), "batch", "seq")

    def _table(self) -> Float[Array, "V E"]:
        return whole(self.embedding, self.dtype).tokens.table[...]


class EncoderEnd(nnx.Module):
    """What each encoder has beside its layers: its biases by distance, the norm after its layers, its head."""

    def __init__(self, config: MetroConfig, rngs: nnx.Rngs) -> None:
        self.distances = DistanceBias(
            config.num_heads,
            num_buckets=config.distance_buckets,
            max_distance=config.max_distance,
            causal=False,
            # 0 at first: all distances are alike
            std=0.0,
            rngs=rngs,
            buckets=signed_buckets(config.distance_buckets, config.max_distance),
        )
        self.norm = make_norm(config, rngs) if config.norm_placement == "pre" else None
        self.masked = MaskedHead(config, rngs)

    def normed(self, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        """What is read of the last layer's output."""
        return x if self.norm is None else self.norm(x)


def hits(places: Int[Array, "B P"], length: int) -> Bool[Array, "B P S"]:
    """Where each place is among the `length` tokens here: nowhere, if it lies on another part of the sequence."""
    return places[:, :, None] == local_positions(length)


def at_places(x: Float[Array, "B S E"], hit: Bool[Array, "B P S"]) -> Float[Array, "B P E"]:
    """What a stream has at places, split over tensor as sequences are; zeros where a place is elsewhere."""
    # a product of which one summand is not 0, whose gradient is one too: nothing is scattered
    chosen = constrain(hit.astype(x.dtype), "batch", "seq", None)
    found = jnp.einsum("bps,bse->bpe", chosen, constrain(x, "batch", "full_seq", "embed"))
    return constrain(found, "batch", "seq", "embed")


def ids_at(ids: Int[Array, "B S"], hit: Bool[Array, "B P S"]) -> Int[Array, "B P"]:
    """The ids at places; 0 where a place is elsewhere."""
    return jnp.where(hit, ids[:, None, :], 0).sum(2)


def written(ids: Int[Array, "B S"], drawn: Int[Array, "B P"], hit: Bool[Array, "B P S"]) -> Int[Array, "B S"]:
    """The ids with those that were drawn at their places."""
    return jnp.where(hit.any(1), jnp.where(hit, drawn[:, :, None], 0).sum(1), ids)

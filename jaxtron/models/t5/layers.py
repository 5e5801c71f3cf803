"""Layers of T5's encoder and decoder: norms by the root mean square before each branch, nothing has a bias."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.selection import Backend
from jaxtron.layers.attention import Attention, Core
from jaxtron.layers.cache import KeyValues
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.mlp import Mlp
from jaxtron.layers.norm import Norm
from jaxtron.layers.relations.cross import CrossAttention
from jaxtron.layers.saved import save_for_backward
from jaxtron.models.growing import by_position
from jaxtron.models.stacked import stacked
from jaxtron.models.t5.attention_backends import CROSS, DECODER, ENCODER, attention_spec
from jaxtron.models.t5.config import T5Config
from jaxtron.pipeline.partition import Partition
from jaxtron.typing import Array, DTypeLike, Float

# of a decoder's layer: of its own sequence, and of the encoder's
LayerMemory = tuple[KeyValues, KeyValues]
Backends = Mapping[str, Backend[Implementation]]


def make_norm(config: T5Config, rngs: nnx.Rngs) -> Norm:
    """A norm of the stream."""
    return Norm(config.hidden_size, kind="rms_norm", bias=False, epsilon=config.norm_epsilon, rngs=rngs)


def _core(config: T5Config, kind: str, backends: Backends) -> Core:
    return Core(backends[kind].implementation, attention_spec(config, kind))


def _attention(config: T5Config, kind: str, backends: Backends, rngs: nnx.Rngs) -> Attention:
    return Attention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.head_size,
        qkv_bias=False,
        output_bias=False,
        qk_norm=None,
        rotated=None,
        alibi=False,
        sinks=False,
        core=_core(config, kind, backends),
        dropout=config.dropout,
        **_deviations(config),
        rngs=rngs,
    )


def _deviations(config: T5Config) -> dict[str, Any]:
    """Of attention's first weights: of numbers that they sum; scores are not scaled, so queries are smaller yet."""
    factor, hidden = config.initial_factor, config.hidden_size
    return {
        "std": factor * hidden**-0.5,
        "query_std": factor * (hidden * config.head_size) ** -0.5,
        "output_std": factor * config.heads_width**-0.5,
    }


def _mlp(config: T5Config, rngs: nnx.Rngs) -> Mlp:
    return Mlp(
        config.hidden_size,
        config.mlp_width,
        activation=config.activation,
        bias=False,
        std=config.initial_factor * config.hidden_size**-0.5,
        output_std=config.initial_factor * config.mlp_width**-0.5,
        dropout=config.dropout,
        rngs=rngs,
    )


class T5EncoderLayer(nnx.Module):
    """`x + branch(norm(x))` of attention over all tokens, then of an MLP."""

    def __init__(self, config: T5Config, backends: Backends, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, rngs)
        self.attention = _attention(config, ENCODER, backends, rngs)
        self.mlp_norm = make_norm(config, rngs)
        self.mlp = _mlp(config, rngs)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        x = save_for_backward(x + self.attention(self.attention_norm(x), inputs.fold(0)))
        return save_for_backward(x + self.mlp(self.mlp_norm(x), inputs.fold(1)))


class T5DecoderLayer(nnx.Module):
    """The same of causal attention, of attention to a memory, and of an MLP."""

    def __init__(self, config: T5Config, backends: Backends, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, rngs)
        self.attention = _attention(config, DECODER, backends, rngs)
        self.cross_norm = make_norm(config, rngs)
        self.cross = CrossAttention(
            config.hidden_size,
            num_heads=config.num_heads,
            head_dim=config.head_size,
            bias=False,
            core=_core(config, CROSS, backends),
            dropout=config.dropout,
            **_deviations(config),
            rngs=rngs,
        )
        self.mlp_norm = make_norm(config, rngs)
        self.mlp = _mlp(config, rngs)

    def __call__(
        self, x: Float[Array, "B S E"], memory: Float[Array, "B T E"], inputs: LayerInputs
    ) -> Float[Array, "B S E"]:
        x = save_for_backward(x + self.attention(self.attention_norm(x), inputs.fold(0)))
        x = save_for_backward(x + self.cross(self.cross_norm(x), memory, inputs.fold(1)))
        return save_for_backward(x + self.mlp(self.mlp_norm(x), inputs.fold(2)))

    def start(self, rows: int, room: int, dtype: DTypeLike) -> LayerMemory:
        """What it remembers of so many rows before anything comes, with room for so many tokens of each sequence."""
        return self.attention.start(rows, room, 1, dtype), self.cross.start(rows, room, dtype)

    def advance(
        self, x: Float[Array, "B S E"], memory: LayerMemory, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], LayerMemory]:
        """The stream for what follows a sequence of which this is the memory, whole on every part of `mesh.tensor`."""
        own, other = memory
        y, own = self.attention.advance(self.attention_norm(x), own, inputs)
        x = x + y
        x = x + self.cross.advance(self.cross_norm(x), other, inputs)
        return x + by_position(lambda x: self.mlp(x, LayerInputs()), self.mlp_norm(x)), (own, other)


class T5Encoder(nnx.Module):
    """The layers of the encoder, stacked."""

    def __init__(self, config: T5Config, backends: Backends, partition: Partition, rngs: nnx.Rngs) -> None:
        self.layers = stacked(partial(T5EncoderLayer, config, backends), partition, rngs)


class T5Decoder(nnx.Module):
    """The layers of the decoder, stacked."""

    def __init__(self, config: T5Config, backends: Backends, partition: Partition, rngs: nnx.Rngs) -> None:
        self.layers = stacked(partial(T5DecoderLayer, config, backends), partition, rngs)

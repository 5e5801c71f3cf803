"""An encoder's layers and the embedding before them, of which families build their models."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.kernels.attention import materialized
from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.layers.attention import Attention, Core, CoreFunction
from jaxtron.layers.embedding import Embedding
from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import normal
from jaxtron.layers.mlp import Mlp
from jaxtron.layers.norm import Norm
from jaxtron.layers.saved import save_for_backward
from jaxtron.models.decoder import recompute
from jaxtron.models.encoder.settings import ATTENTION_CORE, EncoderSettings
from jaxtron.models.stacked import stacked
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.halves import Split, halve, join, split_of
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain
from jaxtron.typing import Array, Float, Int


def make_norm(config: EncoderSettings, rngs: nnx.Rngs) -> Norm:
    """A norm of the stream, of the model's kind."""
    return Norm(
        config.hidden_size, kind=config.norm, bias=config.norms_have_bias, epsilon=config.norm_epsilon, rngs=rngs
    )


def make_core(config: EncoderSettings, implementation: Implementation, spec: AttentionSpec) -> CoreFunction:
    """Attention from heads to heads; where scores are kept, `recompute selective` drops them and runs it again."""
    core = Core(implementation, spec)
    if config.recompute != "selective" or implementation is not materialized:
        return core
    run = recompute.region(ATTENTION_CORE, config.recomputed, core)
    return lambda *arrays: save_for_backward(run(*arrays))


class EncoderEmbedding(nnx.Module):
    """Tokens, learned positions and kinds of tokens, added up; normed where norms come after branches."""

    def __init__(self, config: EncoderSettings, rngs: nnx.Rngs) -> None:
        assert config.max_positions is not None, "the configuration is resolved"
        self.tokens = Embedding(
            config.padded_vocab,
            config.hidden_size,
            num_positions=config.max_positions,
            std=config.initial_std,
            rngs=rngs,
        )
        shape = (config.token_types, config.hidden_size)
        self.types = (
            parameter(rngs, normal(config.initial_std), shape, axes=("positions", "embed"), role="position")
            if config.token_types
            else None
        )
        self.norm = make_norm(config, rngs) if config.norm_placement == "post" else None
        self.dropout = config.dropout

    def __call__(
        self, tokens: Int[Array, "B S"], token_types: Int[Array, "B S"], inputs: LayerInputs
    ) -> Float[Array, "B S E"]:
        """The first layer's input, split over the sequence; `inputs` have keys of this place alone."""
        x = self.tokens(tokens)
        if self.types is not None:
            table = self.types[...]
            # a product, whose gradient is summed as products are, where few rows would each add up thousands of others
            chosen = constrain(jax.nn.one_hot(token_types, len(table), dtype=table.dtype), "batch", "seq", None)
            x = x + constrain(jnp.einsum("bsn,ne->bse", chosen, table), "batch", "seq", "embed")
        x = x if self.norm is None else self.norm(x)
        return dropout(x, self.dropout, inputs, "batch", "seq", "embed")


class EncoderLayer(nnx.Module):
    """Attention and MLP, each a summand of the stream; `core` says what sees what."""

    def __init__(self, config: EncoderSettings, core: CoreFunction, rngs: nnx.Rngs) -> None:
        self.norms_input = config.norm_placement == "pre"
        given: Any = {
            "std": config.initial_std,
            "output_std": config.output_std,
            "dropout": config.dropout,
            "rngs": rngs,
        }
        self.attention = Attention(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_size,
            qkv_bias=True,
            output_bias=True,
            qk_norm=None,
            rotated=None,
            alibi=False,
            sinks=False,
            core=core,
            **given,
        )
        self.attention_norm = make_norm(config, rngs)
        self.mlp = Mlp(config.hidden_size, config.mlp_width, activation=config.activation, bias=True, **given)
        self.mlp_norm = make_norm(config, rngs)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        """The stream after both; on several tensor parts of a GPU its halves go side by side (`sharding/halves.py`)."""
        split = split_of(x)
        parts = [x] if split is None else list(halve(x, split))
        branches = ((self.attention, self.attention_norm), (self.mlp, self.mlp_norm))
        for site, (branch, norm) in enumerate(branches):
            read = [norm(part) for part in parts] if self.norms_input else parts
            made = _run(branch, read, inputs.fold(site), split)
            parts = [save_for_backward(part + y) for part, y in zip(parts, made, strict=True)]
            parts = parts if self.norms_input else [norm(part) for part in parts]
        return parts[0] if split is None else join(parts[0], parts[1], split)


def _run(
    branch: Attention | Mlp, parts: Sequence[Array], inputs: LayerInputs, split: Split | None
) -> tuple[Array, ...]:
    """What a branch makes of the stream, or of its halves."""
    if split is None:
        return (branch(parts[0], inputs),)
    if split == "positions" and isinstance(branch, Attention):
        return branch.halves_of_positions(parts, inputs)
    return tuple(branch(part, own) for part, own in zip(parts, inputs.halves(split), strict=True))


class EncoderLayers(nnx.Module):
    """A stack of equal layers, at `layers`."""

    def __init__(self, config: EncoderSettings, core: CoreFunction, partition: Partition, rngs: nnx.Rngs) -> None:
        self.layers = stacked(functools.partial(EncoderLayer, config, core), partition, rngs)

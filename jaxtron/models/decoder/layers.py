"""The module of each kind of layer, from a decoder's configuration."""

import functools
from collections.abc import Callable, Mapping

from flax import nnx

from jaxtron.kernels.attention import materialized
from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.selection import Backend
from jaxtron.layers.attention import Attention, Core, CoreFunction
from jaxtron.layers.inputs import RotaryKey
from jaxtron.layers.latent import LatentAttention
from jaxtron.layers.mlp import Mlp
from jaxtron.layers.moe.moe import Moe
from jaxtron.layers.norm import HeadNorm, Norm
from jaxtron.layers.saved import save_for_backward
from jaxtron.layers.ssm.delta import GatedDeltaNet
from jaxtron.layers.ssm.mamba1 import Mamba1
from jaxtron.layers.ssm.mamba2 import Mamba2
from jaxtron.models.decoder import recompute
from jaxtron.models.decoder.attention_backends import attention_spec
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import (
    ATTENTION,
    DELTA,
    LATENT,
    MAMBA,
    MAMBA1,
    MLP,
    MOE,
    WINDOW,
    LayerKind,
    expert_width,
)
from jaxtron.models.decoder.state_space import mamba1_channels, mamba1_rank, mamba2_heads

# of attention, by the pattern's symbol
Backends = Mapping[str, Backend[Implementation]]
Builder = Callable[[ModelConfig, LayerKind, Backends, nnx.Rngs], nnx.Module]


def make_norm(config: ModelConfig, size: int, rngs: nnx.Rngs) -> Norm:
    """The model's kind of norm over `size` channels."""
    return Norm(size, kind=config.norm, bias=config.norms_have_bias, epsilon=config.norm_epsilon, rngs=rngs)


def _core(config: ModelConfig, kind: LayerKind, backends: Backends) -> CoreFunction:
    """Attention from heads to heads, computed again in the backward where that is asked for.

    `selective` drops what is quadratic in the sequence, and computes nothing again that keeps no scores.
    """
    implementation = backends[kind.symbol].implementation
    core = Core(implementation, attention_spec(config, kind.symbol))
    keeps_scores = implementation is materialized
    if "attention_core" not in config.recomputed or (config.recompute == "selective" and not keeps_scores):
        return core
    run = recompute.region("attention_core", config.recomputed, core)
    return lambda *arrays: save_for_backward(run(*arrays))


def _attention(config: ModelConfig, kind: LayerKind, backends: Backends, rngs: nnx.Rngs) -> Attention:
    return Attention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_size,
        qkv_bias=config.has_qkv_bias,
        output_bias=config.has_attention_output_bias,
        qk_norm=functools.partial(_qk_norm, config, rngs) if config.qk_norm else None,
        rotated=_rotated(config, kind),
        alibi=config.position == "alibi",
        sinks=config.attention.sinks,
        core=_core(config, kind, backends),
        std=config.initial_std,
        output_std=config.output_std,
        dropout=config.dropout,
        rngs=rngs,
        scaling=config.fp8.scaling,
        gate=config.attention.output_gate,
    )


def _qk_norm(config: ModelConfig, rngs: nnx.Rngs, heads: dict[str, int]) -> Norm | HeadNorm:
    """That of queries or keys of so many heads, by the name of their axis."""
    if config.qk_norm is True:
        return make_norm(config, config.head_size, rngs)
    return HeadNorm(
        heads,
        config.head_size,
        as_one=config.qk_norm == "projection",
        kind=config.norm,
        bias=config.norms_have_bias,
        epsilon=config.norm_epsilon,
        rngs=rngs,
    )


def _latent(config: ModelConfig, kind: LayerKind, backends: Backends, rngs: nnx.Rngs) -> LatentAttention:
    return LatentAttention(
        config.hidden_size,
        config.latent,
        num_heads=config.num_heads,
        rotated=_rotated(config, kind),
        bias=config.bias,
        norm=functools.partial(make_norm, config, rngs=rngs),
        core=_core(config, kind, backends),
        std=config.initial_std,
        output_std=config.output_std,
        dropout=config.dropout,
        rngs=rngs,
        scaling=config.fp8.scaling,
    )


def _rotated(config: ModelConfig, kind: LayerKind) -> RotaryKey | None:
    """By which tables the layer's positions turn its heads (none: they are others)."""
    assert kind.heads is not None
    heads = kind.heads(config)
    return (heads.rotary, heads.rotated) if config.position == "rotary" else None


def _mlp(config: ModelConfig, kind: LayerKind, backends: Backends, rngs: nnx.Rngs) -> Mlp:
    return Mlp(
        config.hidden_size,
        config.mlp_width,
        activation=config.activation,
        bias=config.has_mlp_bias,
        std=config.initial_std,
        output_std=config.output_std,
        dropout=config.dropout,
        rngs=rngs,
        scaling=config.fp8.scaling,
    )


def _moe(config: ModelConfig, kind: LayerKind, backends: Backends, rngs: nnx.Rngs) -> Moe:
    return Moe(
        config.hidden_size,
        expert_width(config),
        config.moe,
        activation=config.activation,
        bias=config.expert_bias,
        std=config.initial_std,
        output_std=config.output_std,
        dropout=config.dropout,
        rngs=rngs,
    )


def _mamba(config: ModelConfig, kind: LayerKind, backends: Backends, rngs: nnx.Rngs) -> Mamba2:
    return Mamba2(
        config.hidden_size,
        mamba2_heads(config),
        config.mamba,
        std=config.initial_std,
        output_std=config.output_std,
        epsilon=config.norm_epsilon,
        dropout=config.dropout,
        rngs=rngs,
    )


def _mamba1(config: ModelConfig, kind: LayerKind, backends: Backends, rngs: nnx.Rngs) -> Mamba1:
    return Mamba1(
        config.hidden_size,
        mamba1_channels(config),
        mamba1_rank(config),
        config.mamba,
        std=config.initial_std,
        output_std=config.output_std,
        epsilon=config.norm_epsilon,
        dropout=config.dropout,
        rngs=rngs,
    )


def _delta(config: ModelConfig, kind: LayerKind, backends: Backends, rngs: nnx.Rngs) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.hidden_size,
        config.delta,
        std=config.initial_std,
        output_std=config.output_std,
        epsilon=config.norm_epsilon,
        dropout=config.dropout,
        rngs=rngs,
    )


# By symbol, the keys of `kinds.KINDS`: (normalized input [B S E], LayerInputs) -> what is added to the stream [B S E].
BUILDERS: dict[str, Builder] = {
    ATTENTION.symbol: _attention,
    WINDOW.symbol: _attention,
    LATENT.symbol: _latent,
    MLP.symbol: _mlp,
    MOE.symbol: _moe,
    MAMBA1.symbol: _mamba1,
    MAMBA.symbol: _mamba,
    DELTA.symbol: _delta,
}

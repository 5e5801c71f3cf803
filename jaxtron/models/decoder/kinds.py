"""The kinds of layers a decoder's pattern is made of: one entry of a table says all that the rest of the house asks.

What a kind computes is built by the entry of the same symbol in `layers.BUILDERS`, which needs JAX, and what it takes
of a GPU is in `LAYER_WORK` of `work.py`; the tests hold the tables' keys equal.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from jaxtron.config import NoEffect, UserError
from jaxtron.layers.config import GATED, LatentConfig
from jaxtron.layers.ssm.config import DeltaConfig
from jaxtron.models.decoder.settings import DecoderSettings
from jaxtron.models.decoder.state_space import (
    check_delta,
    check_mamba1,
    check_mamba2,
    delta_flops,
    delta_parameters,
    mamba1_flops,
    mamba1_parameters,
    mamba2_flops,
    mamba2_parameters,
    validate_delta,
    validate_mamba1,
    validate_mamba2,
)
from jaxtron.models.fits import check_heads, check_multiple
from jaxtron.sharding.config import ContextConfig
from jaxtron.words import plural


class HeadSizes(NamedTuple):
    """What attention of a kind computes with beside `model.num_heads` queries of a token."""

    kv_heads: int
    key: int
    """Dimensions of a query and of a key."""
    value: int
    rotated: int
    """Dimensions that rotary positions turn."""
    scale: float | None = None
    """Factor of scores (none: 1 / sqrt(key))."""
    rotary: str = "rotary"
    """The setting that says how positions turn them."""


@dataclass(frozen=True)
class LayerKind:
    """One kind of residual branch.

    `sizes` of a check are devices by flag of the mesh, `tensor` the parts of heads and MLP; parameters are those of one
    device of so many, without the norm before the branch. FLOPs are those of one token's forward, 2 a multiplication
    with its addition, by region: what lies in a part is not counted in the whole.
    """

    symbol: str
    """One character of `model.pattern`."""
    name: str
    """For messages."""
    module: str
    """The name of its parameters in a layer, and of the whole branch in `model.recompute`."""
    parameters: Callable[[DecoderSettings, int], int]
    """(settings, tensor) -> parameters of a branch on a device."""
    flops: Callable[[DecoderSettings, int], dict[str, int]]
    """(settings, sequence length) -> FLOPs by region."""
    layer: str = ""
    """The name of its layers among others of a mixed pattern, where another kind has this module too (none: the
    module's)."""
    fields: tuple[str, ...] = ()
    """Settings of the model that have no effect without a layer that reads them."""
    widths: tuple[str, ...] = ()
    """Settings that decide how large it is, beside the stream's width; told where a model is too large."""
    parts: tuple[str, ...] = ()
    """Regions inside of the branch that `model.recompute` can name too."""
    selective: tuple[str, ...] = ()
    """Those of them that `recompute: selective` drops and computes again (2205.05198): quadratic in the sequence."""
    attends: Literal["all", "window"] | None = None
    """Whether its tokens see others of their sequence by attention: all before them, or `model.attention.window`."""
    heads: Callable[[DecoderSettings], HeadSizes] | None = None
    """Those of a kind that attends."""
    expert_parameters: Callable[[DecoderSettings], int] | None = None
    """Those of all its experts, which mesh.expert and mesh.expert_tensor split (none: it has none)."""
    validate: Callable[[DecoderSettings], None] = lambda settings: None
    """`UserError` for settings that do not go together, whatever the mesh."""
    check: Callable[[DecoderSettings, Mapping[str, int], int, ContextConfig], None] = lambda *_: None
    """(settings, sizes of the mesh by flag, sequence length, how sequences are split): `UserError` where they do not
    fit."""

    @property
    def regions(self) -> tuple[str, ...]:
        """All that `model.recompute` can name of it."""
        return (self.module, *self.parts)


def norm_parameters(settings: DecoderSettings, size: int) -> int:
    """Parameters of one of the model's norms over `size` channels."""
    return size * (2 if settings.norms_have_bias else 1)


def local_kv_heads(settings: DecoderSettings, tensor: int) -> int:
    """Key/value heads of each of `tensor` devices: all of them where they do not split."""
    return settings.kv_heads // tensor if settings.kv_heads % tensor == 0 else settings.kv_heads


def _attention_parameters(settings: DecoderSettings, tensor: int) -> int:
    hidden, head = settings.hidden_size, settings.head_size
    heads, kv_heads = settings.num_heads // tensor, local_kv_heads(settings, tensor)
    gates = heads * settings.attention.output_gate
    biases = head * (heads + 2 * kv_heads + gates) * settings.has_qkv_bias + hidden * settings.has_attention_output_bias
    scales = 2 if settings.qk_norm is True else (heads + kv_heads) * bool(settings.qk_norm)
    norms = scales * norm_parameters(settings, head)
    return hidden * head * (2 * (heads + kv_heads) + gates) + biases + norms + settings.attention.sinks * heads


def _attention_heads(settings: DecoderSettings) -> HeadSizes:
    head = settings.head_size
    rotated = settings.rotary.dimensions(head)
    return HeadSizes(settings.kv_heads, head, head, rotated, settings.attention.scale)


def _window_heads(settings: DecoderSettings) -> HeadSizes:
    heads, rotary = _attention_heads(settings), settings.window_rotary
    if rotary is None:
        return heads
    return heads._replace(rotated=rotary.dimensions(settings.head_size), rotary="window_rotary")


def _attention_flops(settings: DecoderSettings, seen: int) -> dict[str, int]:
    """Of a token that sees so many others; the papers count the whole square of scores, masked or not."""
    width = settings.num_heads * settings.head_size
    projected = 2 * (width + settings.kv_heads * settings.head_size) + width * settings.attention.output_gate
    return {"attention": 2 * settings.hidden_size * projected, "attention_core": 4 * seen * width}


def _validate_attention(settings: DecoderSettings) -> None:
    if settings.head_dim is None and settings.hidden_size % settings.num_heads:
        raise UserError(
            f"model.hidden_size {settings.hidden_size} is not a multiple of model.num_heads {settings.num_heads}; "
            "change one or set model.head_dim"
        )
    if settings.num_heads % settings.kv_heads:
        raise UserError(
            f"model.num_heads {settings.num_heads} is not a multiple of model.num_kv_heads {settings.kv_heads}"
        )


def _check_attention(settings: DecoderSettings, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    kv_heads = max(settings.kv_heads, sizes["tensor"])
    check_heads({"num_heads": settings.num_heads, "num_kv_heads": kv_heads}, sizes, context)


def _latent_heads(settings: DecoderSettings) -> HeadSizes:
    latent, scaling = settings.latent, settings.rotary.scaling
    scale = (1.0 if scaling is None else scaling.latent_scores) / math.sqrt(latent.key_dim)
    rotated = settings.rotary.dimensions(latent.qk_rope_head_dim)
    return HeadSizes(settings.num_heads, latent.key_dim, latent.v_head_dim, rotated, settings.attention.scale or scale)


def _latent_parameters(settings: DecoderSettings, tensor: int) -> int:
    """Products to latents are whole on each device; their norms have no more than one parameter a channel and bias."""
    latent, hidden, heads = settings.latent, settings.hidden_size, settings.num_heads // tensor
    rank, queries = latent.kv_lora_rank, latent.q_lora_rank
    down = rank + latent.qk_rope_head_dim + (queries or 0)
    up = heads * ((queries or hidden) * latent.key_dim + rank * (latent.qk_nope_head_dim + latent.v_head_dim))
    norms = norm_parameters(settings, rank) + (norm_parameters(settings, queries) if queries else 0)
    biases = (down + hidden) * settings.bias
    return hidden * (down + heads * latent.v_head_dim) + up + norms + biases


def _latent_flops(settings: DecoderSettings, length: int) -> dict[str, int]:
    """As those of attention: its scores are as wide as keys, their mix as values."""
    latent, heads, hidden = settings.latent, settings.num_heads, settings.hidden_size
    rank, queries = latent.kv_lora_rank, latent.q_lora_rank
    down = hidden * (rank + latent.qk_rope_head_dim + (queries or 0))
    up = heads * ((queries or hidden) * latent.key_dim + rank * (latent.qk_nope_head_dim + latent.v_head_dim))
    return {
        "attention": 2 * (down + up + hidden * heads * latent.v_head_dim),
        "attention_core": 2 * length * heads * (latent.key_dim + latent.v_head_dim),
    }


def _validate_latent(settings: DecoderSettings) -> None:
    if settings.position == "alibi":
        raise UserError("model.position alibi: latent attention (L) has none; use --model.position rotary")
    if settings.attention.sinks:
        raise UserError("model.attention.sinks true: latent attention (L) has none; set --model.attention.sinks false")
    if settings.attention.output_gate:
        raise UserError("model.attention.output_gate true: latent attention (L) has none; leave it out")


def _check_latent(settings: DecoderSettings, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    check_heads({"num_heads": settings.num_heads}, sizes, context)


def _mlp_parameters(settings: DecoderSettings, tensor: int) -> int:
    hidden, width = settings.hidden_size, settings.mlp_width // tensor
    up = width * (2 if settings.activation in GATED else 1)
    return hidden * (up + width) + (up + hidden if settings.has_mlp_bias else 0)


def _mlp_flops(settings: DecoderSettings, length: int) -> dict[str, int]:
    matrices = 3 if settings.activation in GATED else 2
    return {"mlp": 2 * settings.hidden_size * settings.mlp_width * matrices}


def _validate_mlp(settings: DecoderSettings) -> None:
    if not settings.mlp_width:
        raise UserError(
            f"model.hidden_size {settings.hidden_size} is too small for the default width of a gated MLP; "
            "set model.mlp_size"
        )


def _check_mlp(settings: DecoderSettings, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    check_multiple("model.mlp_size", settings.mlp_width, sizes["tensor"])


def expert_width(settings: DecoderSettings) -> int:
    """Width of an expert's MLP."""
    return settings.moe.expert_size or settings.mlp_width


def _expert_parameters(settings: DecoderSettings) -> int:
    return settings.moe.num_experts * _expert_sizes(settings, expert_width(settings))


def _expert_sizes(settings: DecoderSettings, width: int) -> int:
    """Parameters of an MLP of this width among experts."""
    hidden, inputs = settings.hidden_size, 2 if settings.activation in GATED else 1
    biases = inputs * width + hidden if settings.expert_bias else 0
    return (inputs + 1) * hidden * width + biases


def _moe_parameters(settings: DecoderSettings, tensor: int) -> int:
    moe = settings.moe
    router = moe.num_experts * (settings.hidden_size + settings.expert_bias)
    shared = _expert_sizes(settings, moe.shared_size // tensor) if moe.shared_size else 0
    return _expert_parameters(settings) + router + shared + settings.hidden_size * moe.shared_gate


def _moe_flops(settings: DecoderSettings, length: int) -> dict[str, int]:
    moe, matrices = settings.moe, 3 if settings.activation in GATED else 2
    width = moe.top_k * expert_width(settings) + moe.shared_size
    return {"moe": 2 * settings.hidden_size * (moe.num_experts + width * matrices + moe.shared_gate)}


def _validate_moe(settings: DecoderSettings) -> None:
    moe = settings.moe
    if moe.top_k > moe.num_experts:
        raise UserError(
            f"model.moe.top_k {moe.top_k} is more than model.moe.num_experts {moe.num_experts}; change one of them"
        )
    if moe.groups == 1 and moe.top_groups > 1 or moe.top_groups > moe.groups:
        raise UserError(
            f"model.moe.top_groups {moe.top_groups} is more than model.moe.groups {moe.groups}; change one of them"
        )
    if moe.num_experts % moe.groups:
        raise UserError(
            f"model.moe.num_experts {moe.num_experts} is not a multiple of model.moe.groups {moe.groups}; change one"
        )
    reachable = moe.num_experts // moe.groups * moe.top_groups
    if moe.groups > 1 and moe.top_k > reachable:
        raise UserError(
            f"model.moe.top_k {moe.top_k} is more than the {plural(reachable, 'expert')} in model.moe.top_groups "
            f"{moe.top_groups} of model.moe.groups {moe.groups}; change one of them"
        )
    if moe.groups > 1 and moe.group_score == "two_largest" and moe.num_experts == moe.groups:
        raise UserError(
            f"model.moe.group_score two_largest needs groups of two experts: model.moe.groups {moe.groups} have one "
            f"each of model.moe.num_experts {moe.num_experts}; lower model.moe.groups"
        )
    if moe.exchange == "capacity" and moe.capacity_factor is None:
        raise UserError(
            "model.moe.exchange capacity needs model.moe.capacity_factor: set it, or --model.moe.exchange rounds"
        )
    ignored = {
        "renormalize": moe.scores == "topk_softmax" and {"model.moe.scores": moe.scores},
        "group_score": moe.groups == 1 and {"model.moe.groups": 1},
        "shared_gate": moe.shared_size == 0 and {"model.moe.shared_size": 0},
        "drop": moe.capacity_factor is None and {"model.moe.capacity_factor": "none"},
        "balance_over": moe.balance == 0 and {"model.moe.balance": 0},
        "slots": moe.exchange == "capacity" and {"model.moe.exchange": moe.exchange},
        "implementation": moe.buckets == "expert" and {"model.moe.buckets": moe.buckets},
    }
    for name, choice in ignored.items():
        if choice and getattr(moe, name) != type(moe).model_fields[name].default:
            raise NoEffect(f"model.moe.{name}", getattr(moe, name), choice, "leave it out")


def _check_moe(settings: DecoderSettings, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    # the experts' own view is not among the sizes: the rules refuse what it does not split
    if settings.moe.shared_size:
        check_multiple("model.moe.shared_size", settings.moe.shared_size, sizes["tensor"])


ATTENTION = LayerKind(
    symbol="*",
    name="attention",
    module="attention",
    parameters=_attention_parameters,
    flops=_attention_flops,
    fields=(
        "num_kv_heads",
        "head_dim",
        "qk_norm",
        "qkv_bias",
        "attention_output_bias",
        "attention_dropout",
        "attention",
        "fp8",
    ),
    widths=("head_dim",),
    parts=("attention_core",),
    selective=("attention_core",),
    attends="all",
    heads=_attention_heads,
    validate=_validate_attention,
    check=_check_attention,
)
WINDOW = replace(
    ATTENTION,
    symbol="W",
    name="attention in a window",
    layer="window_attention",
    fields=(*ATTENTION.fields, "window_rotary"),
    heads=_window_heads,
    flops=lambda settings, length: _attention_flops(settings, min(settings.attention.window or 0, length)),
    attends="window",
)
LATENT = LayerKind(
    symbol="L",
    name="latent attention",
    module="attention",
    layer="latent_attention",
    parameters=_latent_parameters,
    flops=_latent_flops,
    fields=("attention_dropout", "attention", "latent", "fp8"),
    widths=tuple(f"latent.{name}" for name in LatentConfig.model_fields),
    parts=("attention_core",),
    selective=("attention_core",),
    attends="all",
    heads=_latent_heads,
    validate=_validate_latent,
    check=_check_latent,
)
MLP = LayerKind(
    symbol="-",
    name="MLP",
    module="mlp",
    parameters=_mlp_parameters,
    flops=_mlp_flops,
    fields=("mlp_size", "activation", "mlp_bias", "fp8"),
    widths=("mlp_size",),
    validate=_validate_mlp,
    check=_check_mlp,
)
MOE = LayerKind(
    symbol="E",
    name="mixture of experts",
    module="moe",
    parameters=_moe_parameters,
    flops=_moe_flops,
    fields=("mlp_size", "activation", "moe"),
    widths=("moe.num_experts", "moe.expert_size", "moe.shared_size"),
    expert_parameters=_expert_parameters,
    validate=_validate_moe,
    check=_check_moe,
)
MAMBA = LayerKind(
    symbol="M",
    name="Mamba-2",
    module="mamba",
    parameters=mamba2_parameters,
    flops=mamba2_flops,
    fields=("mamba",),
    widths=("mamba.expand", "mamba.num_heads", "mamba.head_dim", "mamba.state_size", "mamba.conv_width"),
    validate=validate_mamba2,
    check=check_mamba2,
)
MAMBA1 = replace(
    MAMBA,
    symbol="m",
    name="Mamba",
    layer="mamba1",
    widths=("mamba.expand", "mamba.state_size", "mamba.conv_width", "mamba.dt_rank"),
    parameters=mamba1_parameters,
    flops=mamba1_flops,
    validate=validate_mamba1,
    check=check_mamba1,
)
DELTA = LayerKind(
    symbol="G",
    name="gated delta net",
    module="delta",
    parameters=delta_parameters,
    flops=delta_flops,
    fields=("delta",),
    widths=tuple(f"delta.{name}" for name in DeltaConfig.model_fields if name.startswith("linear_")),
    validate=validate_delta,
    check=check_delta,
)
KINDS = {kind.symbol: kind for kind in (ATTENTION, WINDOW, LATENT, MLP, MOE, MAMBA1, MAMBA, DELTA)}

"""State-space layers of a decoder, without JAX: sizes, parameters, FLOPs, and what does not go together."""

import math
from collections.abc import Mapping

from jaxtron.config import NoEffect, UserError
from jaxtron.models.decoder.settings import DecoderSettings
from jaxtron.models.fits import check_multiple
from jaxtron.sharding.config import ContextConfig

# in messages, before their number
_HEADS = "heads of Mamba-2 (model.mamba.num_heads)"


def mamba2_heads(settings: DecoderSettings) -> int:
    """Heads of a Mamba-2 layer."""
    mamba = settings.mamba
    return mamba.num_heads or round(mamba.expand * settings.hidden_size) // mamba.head_dim


def mamba2_groups(settings: DecoderSettings, tensor: int) -> int:
    """Groups on each of `tensor` devices: all of them where they do not split."""
    groups = settings.mamba.num_groups
    return groups // tensor if groups % tensor == 0 else groups


def mamba2_parameters(settings: DecoderSettings, tensor: int) -> int:
    mamba, heads = settings.mamba, mamba2_heads(settings) // tensor
    inner, shared = heads * mamba.head_dim, 2 * mamba2_groups(settings, tensor) * mamba.state_size
    convolved = (mamba.conv_width + 1) * (inner + shared)
    # of the heads: their step's bias, decay and skip; of the channels the norm's scale
    return settings.hidden_size * (3 * inner + shared + heads) + convolved + 3 * heads + inner


def mamba2_flops(settings: DecoderSettings, length: int) -> dict[str, int]:
    """Megatron's count: the products, and 7 for each number of the state."""
    mamba, heads = settings.mamba, mamba2_heads(settings)
    inner = heads * mamba.head_dim
    products = 3 * inner + 2 * mamba.num_groups * mamba.state_size + heads
    return {"mamba": 2 * settings.hidden_size * products + 7 * inner * mamba.state_size}


def validate_mamba2(settings: DecoderSettings) -> None:
    mamba, heads = settings.mamba, mamba2_heads(settings)
    channels = mamba.expand * settings.hidden_size
    if mamba.num_heads is None and (heads == 0 or heads * mamba.head_dim != channels):
        raise UserError(
            f"model.mamba.expand {mamba.expand:g} x model.hidden_size {settings.hidden_size} = {channels:g} is not a "
            f"multiple of model.mamba.head_dim {mamba.head_dim}; change one, or set model.mamba.num_heads"
        )
    for name in ("num_groups", "norm_groups"):
        groups = getattr(mamba, name)
        if groups is not None and heads % groups:
            others = "" if mamba.num_heads else ", or model.mamba.head_dim"
            raise UserError(
                f"{_HEADS} {heads} is not a multiple of model.mamba.{name} {groups}; change one of them{others}"
            )
    if mamba.num_heads is not None and "m" not in settings.pattern:
        if mamba.expand != type(mamba).model_fields["expand"].default:
            because = {"model.mamba.num_heads": mamba.num_heads}
            raise NoEffect("model.mamba.expand", mamba.expand, because, "leave one of them out")
    _refuse_others(settings, "m", "Mamba (m)", "dt_rank inner_norms")


def check_mamba2(settings: DecoderSettings, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    mamba, tensor = settings.mamba, sizes["tensor"]
    _check_convolution("model.mamba.conv_width", mamba.conv_width, sizes, length)
    check_multiple(_HEADS, mamba2_heads(settings), tensor)
    for name in ("num_groups", "norm_groups"):
        groups = getattr(mamba, name)
        if groups is not None and groups % tensor and tensor % groups:
            raise UserError(
                f"model.mamba.{name} {groups} and mesh.tensor {tensor}: neither is a multiple of the other; change one"
            )


def mamba1_channels(settings: DecoderSettings) -> int:
    """Channels of a Mamba layer, each with a state."""
    return round(settings.mamba.expand * settings.hidden_size)


def mamba1_rank(settings: DecoderSettings) -> int:
    """Numbers that the steps of all channels are made of."""
    return settings.mamba.dt_rank or math.ceil(settings.hidden_size / 16)


def mamba1_parameters(settings: DecoderSettings, tensor: int) -> int:
    mamba, channels, rank = settings.mamba, mamba1_channels(settings) // tensor, mamba1_rank(settings)
    # of a channel: the convolution and its bias, what B, C and steps are made with and of, the step's bias, and skip
    own = mamba.conv_width + 1 + (rank + 2 * mamba.state_size) + rank + mamba.state_size + 2
    # each part has those of its norms
    norms = (rank + 2 * mamba.state_size) * mamba.inner_norms
    return channels * (3 * settings.hidden_size + own) + norms


def mamba1_flops(settings: DecoderSettings, length: int) -> dict[str, int]:
    """The products, and 7 for each number of the state (Megatron's count of Mamba-2's)."""
    mamba, channels, rank = settings.mamba, mamba1_channels(settings), mamba1_rank(settings)
    products = 3 * settings.hidden_size + 2 * rank + 2 * mamba.state_size
    return {"mamba": channels * (2 * products + 7 * mamba.state_size)}


def validate_mamba1(settings: DecoderSettings) -> None:
    mamba, channels = settings.mamba, mamba1_channels(settings)
    if channels != mamba.expand * settings.hidden_size:
        raise UserError(
            f"model.mamba.expand {mamba.expand:g} x model.hidden_size {settings.hidden_size} = "
            f"{mamba.expand * settings.hidden_size:g} is no whole number of channels; change one"
        )
    if mamba.implementation == "mosaic":
        raise UserError("model.mamba.implementation mosaic: Mamba (m) has no such kernel; use auto")
    _refuse_others(settings, "M", "Mamba-2 (M)", "head_dim num_heads num_groups norm_groups decay_range")


def check_mamba1(settings: DecoderSettings, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    _check_convolution("model.mamba.conv_width", settings.mamba.conv_width, sizes, length)
    channels = "channels of Mamba (model.mamba.expand x model.hidden_size)"
    check_multiple(channels, mamba1_channels(settings), sizes["tensor"])


def _check_convolution(name: str, width: int, sizes: Mapping[str, int], length: int) -> None:
    """`UserError` where a convolution sees more than the piece before a device's own."""
    parts = sizes["context"]
    piece = length // (2 * parts)
    if parts > 1 and width - 1 > piece:
        raise UserError(
            f"{name} {width} needs the {width - 1} positions before a device's piece of the sequence, and pieces have "
            f"{piece} with data.sequence_length {length} and mesh.context {parts}; lower {name} or mesh.context"
        )


def _refuse_others(settings: DecoderSettings, symbol: str, kind: str, names: str) -> None:
    """`NoEffect` for settings that only another kind reads, which the pattern does not have."""
    for name in names.split() if symbol not in settings.pattern else ():
        value = getattr(settings.mamba, name)
        if value != type(settings.mamba).model_fields[name].default:
            because = {"model.pattern": settings.pattern}
            raise NoEffect(f"model.mamba.{name}", value, because, f"leave it out, or add {kind} to the pattern")


def delta_key_heads(settings: DecoderSettings, tensor: int) -> int:
    """Heads of queries and keys on each of `tensor` devices: all of them where they do not split."""
    heads = settings.delta.linear_num_key_heads
    return heads // tensor if heads % tensor == 0 else heads


def delta_parameters(settings: DecoderSettings, tensor: int) -> int:
    delta, heads = settings.delta, settings.delta.linear_num_value_heads // tensor
    keys = 2 * delta_key_heads(settings, tensor) * delta.linear_key_head_dim
    values, convolved = heads * delta.linear_value_head_dim, delta.linear_conv_kernel_dim
    # of the heads: decay and step's bias; the norm's scale is one for all
    own = 2 * heads + delta.linear_value_head_dim
    return settings.hidden_size * (keys + 3 * values + 2 * heads) + convolved * (keys + values) + own


def delta_flops(settings: DecoderSettings, length: int) -> dict[str, int]:
    """The products, and 7 for each number of the state: it decays, is read by key, written, and read by query."""
    delta, heads = settings.delta, settings.delta.linear_num_value_heads
    keys = 2 * delta.linear_num_key_heads * delta.linear_key_head_dim
    values = heads * delta.linear_value_head_dim
    products = settings.hidden_size * (keys + 3 * values + 2 * heads)
    return {"delta": 2 * products + 7 * values * delta.linear_key_head_dim}


def validate_delta(settings: DecoderSettings) -> None:
    values, keys = settings.delta.linear_num_value_heads, settings.delta.linear_num_key_heads
    if values % keys:
        raise UserError(
            f"model.delta.linear_num_value_heads {values} is not a multiple of model.delta.linear_num_key_heads "
            f"{keys}; change one"
        )


def check_delta(settings: DecoderSettings, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    width = settings.delta.linear_conv_kernel_dim
    _check_convolution("model.delta.linear_conv_kernel_dim", width, sizes, length)
    tensor, keys = sizes["tensor"], settings.delta.linear_num_key_heads
    check_multiple("model.delta.linear_num_value_heads", settings.delta.linear_num_value_heads, tensor)
    if keys % tensor and tensor % keys:
        raise UserError(
            f"model.delta.linear_num_key_heads {keys} and mesh.tensor {tensor}: neither is a multiple of the other; "
            "change one"
        )

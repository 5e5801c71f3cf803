"""The backend of each kind of attention in a decoder, selected before anything is traced."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.backend import Backend, select_backend
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.typing import DTypeLike


def attention_spec(config: ModelConfig, symbol: str) -> AttentionSpec:
    """What attention computes in a layer of this kind, without slopes, segments and dropout's mask: they are arrays."""
    attention = config.attention
    return AttentionSpec(
        window=attention.window if KINDS[symbol].attends == "window" else None,
        logits_scale=attention.scale,
        logits_soft_cap=attention.soft_cap,
        dropout_rate=config.attention_dropout,
        deterministic=attention.deterministic,
    )


def attention_backends(
    config: ModelConfig, dtype: DTypeLike, *, device_kind: str, parts: int = 1, length: int = 1, packed: bool = True
) -> Mapping[str, Backend]:
    """By the pattern's symbol, for sequences of `length` tokens on `parts` devices each of this kind.

    `packed`: several documents in a sequence. Without more being known, short sequences of any documents. `UserError`
    where the implementation asked for cannot.
    """
    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, config.head_size), jnp.dtype(dtype))
        for heads in (config.num_heads, config.kv_heads)
    )
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None
    slopes = jax.ShapeDtypeStruct((config.num_heads,), jnp.float32) if config.position == "alibi" else None
    arrays = {"q_segment_ids": segments, "kv_segment_ids": segments, "alibi_slopes": slopes}
    needs_log_sum_exp = parts > 1 or config.attention.sinks
    return {
        kind.symbol: select_backend(
            config.attention.implementation,
            query,
            key,
            key,
            replace(attention_spec(config, kind.symbol), **arrays),
            device_kind,
            needs_log_sum_exp=needs_log_sum_exp,
        )
        for kind in config.kinds
        if kind.attends
    }

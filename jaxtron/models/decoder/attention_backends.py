"""The backend of each kind of attention in a decoder, selected before anything is traced."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.attention.backend import select_backend
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.selection import Backend
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.typing import DTypeLike


def attention_spec(config: ModelConfig, symbol: str) -> AttentionSpec:
    """What attention computes in a layer of this kind, without its arrays: slopes, segments, dropout's seeds."""
    attention, kind = config.attention, KINDS[symbol]
    assert kind.heads is not None
    return AttentionSpec(
        window=attention.window if kind.attends == "window" else None,
        logits_scale=kind.heads(config).scale,
        logits_soft_cap=attention.soft_cap,
        dropout_rate=config.attention_dropout,
        deterministic=attention.deterministic,
    )


def attention_backends(
    config: ModelConfig, dtype: DTypeLike, *, device_kind: str, parts: int = 1, length: int = 1, packed: bool = True
) -> Mapping[str, Backend[Implementation]]:
    """By the pattern's symbol, for sequences of `length` tokens on `parts` devices each of this kind.

    `packed`: several documents in a sequence. Without more being known, short sequences of any documents. `UserError`
    where the implementation asked for cannot.
    """
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None
    slopes = jax.ShapeDtypeStruct((config.num_heads,), jnp.float32) if config.position == "alibi" else None
    given: dict[str, Any] = {"q_segment_ids": segments, "kv_segment_ids": segments, "alibi_slopes": slopes}
    if parts > 1:
        # each device has two pieces: they start at multiples of this
        given["q_offset"] = length // (2 * parts)
    needs_log_sum_exp = parts > 1 or config.attention.sinks
    found = {}
    for kind in config.kinds:
        if kind.heads is None:
            continue
        sizes = kind.heads(config)
        query, key, value = (
            jax.ShapeDtypeStruct((1, length, heads, width), jnp.dtype(dtype))
            for heads, width in (
                (config.num_heads, sizes.key),
                (sizes.kv_heads, sizes.key),
                (sizes.kv_heads, sizes.value),
            )
        )
        found[kind.symbol] = select_backend(
            config.attention.implementation,
            query,
            key,
            value,
            replace(attention_spec(config, kind.symbol), **given),
            device_kind,
            needs_log_sum_exp=needs_log_sum_exp,
        )
    return found

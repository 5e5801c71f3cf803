"""The backend of attention over all tokens, selected before anything is traced."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.attention.backend import select_backend
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.selection import Backend
from jaxtron.models.encoder.settings import EncoderSettings
from jaxtron.typing import DTypeLike

# its name among a model's backends
ENCODER = "encoder"


def attention_spec(config: EncoderSettings) -> AttentionSpec:
    """What attention computes, without its arrays: segments, dropout's seeds."""
    return AttentionSpec(
        causal=False, dropout_rate=config.attention_dropout, deterministic=config.attention.deterministic
    )


def attention_backends(
    config: EncoderSettings,
    dtype: DTypeLike,
    *,
    device_kind: str,
    parts: int = 1,
    length: int = 1,
    packed: bool = True,
    distances: int = 0,
) -> Mapping[str, Backend[Implementation]]:
    """For sequences of `length` tokens on `parts` devices each of this kind; segments keep padding apart from text.

    With a bias of so many `distances`, if any.

    `UserError` where the implementation asked for cannot.
    """
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    given: dict[str, Any] = {"q_segment_ids": segments, "kv_segment_ids": segments}
    if distances:
        given["distance_bias"] = jax.ShapeDtypeStruct((config.num_heads, distances), jnp.float32)
    if parts > 1:
        # each device has two pieces: they start at multiples of this
        given["q_offset"] = length // (2 * parts)
    heads = jax.ShapeDtypeStruct((1, length, config.num_heads, config.head_size), jnp.dtype(dtype))
    found = select_backend(
        config.attention.implementation,
        *(heads, heads, heads),
        replace(attention_spec(config), **given),
        device_kind,
        needs_log_sum_exp=parts > 1,
    )
    return {ENCODER: found}

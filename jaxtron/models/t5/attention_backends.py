"""The backends of T5's three kinds of attention, selected before anything is traced."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.attention.backend import select_backend
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.selection import Backend
from jaxtron.models.t5.config import T5Config
from jaxtron.typing import DTypeLike

# within the encoder, within the decoder, and from the decoder to the encoder's output
ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"
KINDS = (ENCODER, DECODER, CROSS)


def attention_spec(config: T5Config, kind: str) -> AttentionSpec:
    """What attention computes, without its arrays: segments, biases by distance, dropout's seeds. Scores are not
    scaled."""
    return AttentionSpec(
        causal=kind == DECODER,
        crosses=kind == CROSS,
        logits_scale=1.0,
        dropout_rate=config.attention_dropout,
        deterministic=config.attention.deterministic,
    )


def attention_backends(
    config: T5Config, dtype: DTypeLike, *, device_kind: str, parts: int = 1, length: int = 1, packed: bool = True
) -> Mapping[str, Backend[Implementation]]:
    """By kind, for an encoder's sequences of `length` tokens on `parts` devices each of this kind.

    Segments keep padding apart from text.

    `UserError` where the implementation asked for cannot.
    """
    table = jax.ShapeDtypeStruct((config.num_heads, 2 * config.max_distance + 1), jnp.float32)
    decoder = config.decoder_tokens(length)
    sizes = {ENCODER: (length, length), DECODER: (decoder, decoder), CROSS: (decoder, length)}

    def select(kind: str) -> Backend[Implementation]:
        queries, keys = sizes[kind]
        heads = [
            jax.ShapeDtypeStruct((1, count, config.num_heads, config.head_size), jnp.dtype(dtype))
            for count in (queries, keys, keys)
        ]
        q_segments, kv_segments = (jax.ShapeDtypeStruct((1, count), jnp.int32) for count in (queries, keys))
        spec = replace(
            attention_spec(config, kind),
            q_segment_ids=q_segments,
            kv_segment_ids=kv_segments,
            distance_bias=None if kind == CROSS else table,
            # each device has two pieces: they start at multiples of this
            q_offset=queries // (2 * parts) if parts > 1 else 0,
        )
        name = config.attention.implementation
        return select_backend(name, *heads, spec, device_kind, needs_log_sum_exp=parts > 1)

    return {kind: select(kind) for kind in KINDS}

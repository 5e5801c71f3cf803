"""Who computes each kind of attention in a decoder, known before anything is traced."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.choose import Choice
from jaxtron.kernels.attention.mask import Mask
from jaxtron.layers import flash
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.pattern import ATTENTIONS, WINDOW
from jaxtron.typing import DTypeLike


def attention_mask(config: ModelConfig, symbol: str) -> Mask:
    """Who attends to whom in a layer of this kind, without slopes and segments, which are arrays."""
    window = config.attention.window if symbol == WINDOW else None
    return Mask(window=window, soft_cap=config.attention.soft_cap, scale=config.attention.scale)


def attention_choices(
    config: ModelConfig, length: int, dtype: DTypeLike, *, kind: str, parts: int, packed: bool
) -> dict[str, Choice | None]:
    """By symbol, for sequences of `length` on `parts` devices each of this kind; None: whole scores.

    `packed`: several documents in a sequence. `UserError` where the implementation asked for cannot.
    """
    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, config.head_size), jnp.dtype(dtype))
        for heads in (config.num_heads, config.kv_heads)
    )
    found = {}
    for symbol in ATTENTIONS:
        if config.layout.count(symbol):
            mask = attention_mask(config, symbol)
            if packed:
                segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
                mask = replace(mask, q_segments=segments, kv_segments=segments)
            if config.position == "alibi":
                mask = replace(mask, slopes=jax.ShapeDtypeStruct((config.num_heads,), jnp.float32))
            found[symbol] = flash.chosen(
                config.attention, mask, config.attention_dropout, (query, key, key), kind=kind, parts=parts
            )
    return found


def attention_lines(config: ModelConfig, choices: dict[str, Choice | None], kind: str) -> tuple[str, ...]:
    """One line for each who computes attention on devices of this kind: who, and why."""
    whole = "probabilities are dropped" if config.attention_dropout else f"short sequences, and no kernel for {kind}"
    lines = (f"attention: whole scores ({whole})" if found is None else found.reason for found in choices.values())
    return tuple(dict.fromkeys(lines))

"""Who attends to whom, and how a product of a query and a key becomes a score."""

import functools
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.config import UserError
from jaxtron.typing import Array, Bool, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_offset", "kv_offset", "q_segments", "kv_segments", "slopes"],
    meta_fields=["causal", "window", "soft_cap", "scale"],
)
@dataclass(frozen=True)
class Mask:
    """What every implementation of attention honours or refuses; a pytree of its arrays.

    A score is `q . k * scale`, then `soft_cap * tanh(score / soft_cap)`, then plus `slope * (key - query position)`.
    Segments and slopes are constants: they get no gradient.
    """

    causal: bool = True
    """Attend to keys at the query's position and before it only."""
    window: int | None = None
    """Attend where query position - key position < window, and > -window if not causal; none: any distance."""
    soft_cap: float | None = None
    """Bound of the scores' magnitude (Gemma 2, 2408.00118, section 2); none: unbounded."""
    scale: float | None = None
    """Factor of q . k; none: 1 / sqrt(head dim)."""
    q_offset: "Int[Array, ''] | int" = 0
    """Position of the first query; may be traced (ring attention's is)."""
    kv_offset: "Int[Array, ''] | int" = 0
    """Position of the first key; may be traced."""
    q_segments: "Int[Array, 'B S'] | None" = field(default=None)
    """Document of each query: it attends to keys of equal number only; none: one document."""
    kv_segments: "Int[Array, 'B T'] | None" = field(default=None)
    """Document of each key."""
    slopes: "Float[Array, 'H'] | None" = field(default=None)
    """ALiBi's slope of each query head (2108.12409); none: no bias."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"attention window {self.window} must be at least 1 (1: each position sees itself)")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise UserError(f"attention soft cap {self.soft_cap} must be above 0, or none")

    def factor(self, head_dim: int) -> float:
        """The scale in use for queries of `head_dim`."""
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale


def allowed(mask: Mask, num_queries: int, num_keys: int) -> Bool[Array, "#B S T"]:
    """True where a query attends to a key."""
    queries = mask.q_offset + jnp.arange(num_queries)[:, None]
    keys = mask.kv_offset + jnp.arange(num_keys)[None, :]
    attends = jnp.ones((1, num_queries, num_keys), bool)
    if mask.causal:
        attends &= keys <= queries
    if mask.window is not None:
        attends &= jnp.abs(queries - keys) < mask.window
    if mask.q_segments is not None and mask.kv_segments is not None:
        attends &= mask.q_segments[:, :, None] == mask.kv_segments[:, None, :]
    return attends


def most_pairs(mask: Mask, num_queries: int, num_keys: int) -> int:
    """Pairs of a query and a key that attend, if documents and traced offsets forbid none."""
    width = num_keys if mask.window is None else mask.window * (1 if mask.causal else 2) - (not mask.causal)
    if not all(isinstance(offset, int) for offset in (mask.q_offset, mask.kv_offset)):
        return num_queries * min(num_keys, width)
    places = np.arange(num_queries) + mask.q_offset - mask.kv_offset
    last = np.minimum(places, num_keys - 1) if mask.causal else np.full_like(places, num_keys - 1)
    first = np.zeros_like(places)
    if mask.window is not None:
        first = np.maximum(places - mask.window + 1, 0)
        last = np.minimum(last, places + mask.window - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def check_shapes(q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None = None) -> None:
    """Raises `UserError` where sizes do not fit together, whatever the implementation."""
    (rows, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    if k.shape != (rows, keys, kv_heads, dim) or v.shape[:3] != k.shape[:3] or heads % kv_heads:
        raise UserError(
            f"attention of queries {q.shape}, keys {k.shape}, values {v.shape} does not fit: "
            "[B, S, H, D], [B, T, K, D], [B, T, K, V] with H a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise UserError(f"attention of {q.dtype} queries, {k.dtype} keys, {v.dtype} values: they must be of one type")
    wanted = {
        "q_segments": (mask.q_segments, (rows, queries)),
        "kv_segments": (mask.kv_segments, (rows, keys)),
        "slopes": (mask.slopes, (heads,)),
        "sinks": (sinks, (heads,)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise UserError(f"attention's {name} are {array.shape} and must be {shape}")
    if (mask.q_segments is None) != (mask.kv_segments is None):
        raise UserError("attention's q_segments and kv_segments must be given together, or neither")

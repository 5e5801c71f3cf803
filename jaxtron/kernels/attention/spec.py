"""What attention is to compute: how a product of a query and a key becomes a logit, and which pairs attend.

Shapes: queries [B, S, H, D], keys [B, T, K, D], values [B, T, K, V]; query head h reads key/value head h // (H / K).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.config import UserError
from jaxtron.kernels import toeplitz
from jaxtron.typing import Array, Bool, Float, Int, UInt32

# what an implementation may be able to do beside plain attention, causal or not, with a window or not; the last: run
# where heads are split over an Explicit axis of the mesh, and not inside a manual region alone
Feature = Literal[
    "segments",
    "soft_cap",
    "alibi",
    "distance_bias",
    "offsets",
    "deterministic",
    "dropout",
    "log_sum_exp",
    "explicit_sharding",
]
ARRAYS = ("q_segment_ids", "kv_segment_ids", "alibi_slopes", "distance_bias", "dropout_seeds")
OFFSETS = ("q_offset", "kv_offset")
# queries, keys or values, or what stands for their shape and type
Heads = Array | jax.ShapeDtypeStruct


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*OFFSETS, *ARRAYS],
    meta_fields=["causal", "window", "logits_scale", "logits_soft_cap", "dropout_rate", "deterministic", "crosses"],
)
@dataclass(frozen=True)
class AttentionSpec:
    """What every implementation of attention honours or refuses; a pytree of its arrays, which get no gradient, but for
    `distance_bias`.

    A logit is `q . k * scale`, then `soft_cap * tanh(logit / soft_cap)`, then plus `slope * (key - query position)` and
    the bias of that distance.
    """

    causal: bool = True
    """Attend to keys at the query's position and before it only."""
    window: int | None = None
    """Attend where query position - key position < window, and > -window if not causal; none: any distance."""
    logits_scale: float | None = None
    """Factor of q . k; none: 1 / sqrt(head dim)."""
    logits_soft_cap: float | None = None
    """Bound of the logits' magnitude (Gemma 2, 2408.00118, section 2); none: unbounded."""
    dropout_rate: float = 0.0
    """Part of the probabilities that is dropped where there are `dropout_seeds`."""
    deterministic: bool = False
    """Gradients have the same bits in every run."""
    crosses: bool = False
    """Keys are of another sequence than queries, of which each query may see all (cross-attention)."""
    q_offset: "Int[Array, ''] | int" = 0
    """Position of the first query; may be traced (ring attention's is)."""
    kv_offset: "Int[Array, ''] | int" = 0
    """Position of the first key; may be traced."""
    q_segment_ids: "Int[Array, 'B S'] | None" = None
    """Document of each query: it attends to keys of equal number only; none: one document."""
    kv_segment_ids: "Int[Array, 'B T'] | None" = None
    """Document of each key."""
    alibi_slopes: "Float[Array, 'H'] | None" = None
    """ALiBi's slope of each query head (2108.12409); none: no bias."""
    distance_bias: "Float[Array, 'H N'] | None" = None
    """What each query head adds where a key is so far from a query: number N // 2 at the same position, those after it
    at later keys; beyond the ends of the table as at them (T5, 1910.10683, section 2.1). It gets a gradient."""
    dropout_seeds: "UInt32[Array, 'B H 2'] | None" = None
    """Two random words for each row and query head, which say with positions what is dropped (`dropout.py`); none:
    nothing is."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"attention window {self.window} must be at least 1 (1: each position sees itself)")
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise UserError(f"attention logits_soft_cap {self.logits_soft_cap} must be above 0, or none")
        if self.crosses and (self.causal or self.window is not None):
            raise UserError("attention to another sequence has no order: causal must be false, and the window none")

    def scale(self, head_dim: int) -> float:
        """Factor of q . k for queries of `head_dim`."""
        return 1 / math.sqrt(head_dim) if self.logits_scale is None else self.logits_scale

    @property
    def features(self) -> frozenset[Feature]:
        """What an implementation must be able to do for it."""
        present: dict[Feature, bool] = {
            "segments": self.q_segment_ids is not None or self.kv_segment_ids is not None,
            "soft_cap": self.logits_soft_cap is not None,
            "alibi": self.alibi_slopes is not None,
            "distance_bias": self.distance_bias is not None,
            # traced ones too: their values are unknown here
            "offsets": not all(isinstance(offset, int) and offset == 0 for offset in (self.q_offset, self.kv_offset)),
            "deterministic": self.deterministic,
            "dropout": self.dropout_rate > 0,
        }
        return frozenset(name for name, is_there in present.items() if is_there)

    def split(self) -> "tuple[AttentionSpec, dict[str, Array]]":
        """The part known before anything runs, which can be hashed, and the arrays by name."""
        names = [*ARRAYS, *(name for name in OFFSETS if not isinstance(getattr(self, name), int))]
        arrays = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        blank = {name: 0 if name in OFFSETS else None for name in arrays}
        return dataclasses.replace(self, **blank), arrays

    def with_arrays(self, arrays: dict[str, Array]) -> "AttentionSpec":
        """The inverse of `split`."""
        return dataclasses.replace(self, **arrays)


def distances(spec: AttentionSpec, num_queries: int, num_keys: int) -> Int[Array, "S T"]:
    """Position of each query less that of each key."""
    queries = spec.q_offset + jnp.arange(num_queries)[:, None]
    return queries - (spec.kv_offset + jnp.arange(num_keys)[None, :])


def alibi_bias(spec: AttentionSpec, num_queries: int, num_keys: int) -> Float[Array, "H S T"] | None:
    """ALiBi's summand of every logit, in float32; none without slopes."""
    if spec.alibi_slopes is None:
        return None
    distance = distances(spec, num_queries, num_keys).astype(jnp.float32)
    return -spec.alibi_slopes.astype(jnp.float32)[:, None, None] * distance


def distance_bias(spec: AttentionSpec, num_queries: int, num_keys: int) -> Float[Array, "H S T"] | None:
    """The summand of every logit by distance, in float32; none without a table."""
    if spec.distance_bias is None:
        return None
    return toeplitz.matrix(distance_line(spec, num_queries, num_keys), num_queries)


def distance_line(spec: AttentionSpec, num_queries: int, num_keys: int) -> Float[Array, "H L"]:
    """The same by diagonal: from the last query and the first key to the first query and the last key."""
    assert spec.distance_bias is not None
    first = spec.kv_offset - spec.q_offset - (num_queries - 1)
    return toeplitz.line(spec.distance_bias.astype(jnp.float32), first, num_queries + num_keys - 1)


def allowed(spec: AttentionSpec, num_queries: int, num_keys: int) -> Bool[Array, "#B S T"]:
    """True where a query attends to a key."""
    distance = distances(spec, num_queries, num_keys)[None]
    attends = jnp.ones(distance.shape, bool)
    if spec.causal:
        attends &= distance >= 0
    if spec.window is not None:
        attends &= jnp.abs(distance) < spec.window
    if spec.q_segment_ids is not None and spec.kv_segment_ids is not None:
        attends &= spec.q_segment_ids[:, :, None] == spec.kv_segment_ids[:, None, :]
    return attends


def most_pairs(spec: AttentionSpec, num_queries: int, num_keys: int) -> int:
    """Pairs of a query and a key that attend, if documents and traced offsets forbid none."""
    width = num_keys if spec.window is None else spec.window * (1 if spec.causal else 2) - (not spec.causal)
    if not all(isinstance(offset, int) for offset in (spec.q_offset, spec.kv_offset)):
        return num_queries * min(num_keys, width)
    places = np.arange(num_queries) + spec.q_offset - spec.kv_offset
    last = np.minimum(places, num_keys - 1) if spec.causal else np.full_like(places, num_keys - 1)
    first = np.zeros_like(places)
    if spec.window is not None:
        first = np.maximum(places - spec.window + 1, 0)
        last = np.minimum(last, places + spec.window - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def check_shapes(q: Array, k: Array, v: Array, spec: AttentionSpec, sinks: Array | None = None) -> None:
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
        "q_segment_ids": (spec.q_segment_ids, (rows, queries)),
        "kv_segment_ids": (spec.kv_segment_ids, (rows, keys)),
        "alibi_slopes": (spec.alibi_slopes, (heads,)),
        "dropout_seeds": (spec.dropout_seeds, (rows, heads, 2)),
        "sinks": (sinks, (heads,)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise UserError(f"attention's {name} are {array.shape} and must be {shape}")
    table = spec.distance_bias
    if table is not None and (table.ndim != 2 or table.shape[0] != heads or table.shape[1] < 1):
        raise UserError(f"attention's distance_bias is {table.shape} and must be ({heads}, distances)")
    if (spec.q_segment_ids is None) != (spec.kv_segment_ids is None):
        raise UserError("attention's q_segment_ids and kv_segment_ids must be given together, or neither")

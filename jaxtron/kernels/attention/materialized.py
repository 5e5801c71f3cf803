"""Attention with its probabilities in memory: `materialized`, for short sequences.

Softmax is in float32, products in the inputs' type. The backward keeps the probabilities: memory is quadratic in the
sequence.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxtron.kernels.attention.dropout import kept
from jaxtron.kernels.attention.spec import AttentionSpec, Feature, Heads, alibi_bias, allowed, distance_bias
from jaxtron.kernels.dropout import drop
from jaxtron.typing import Array, DTypeLike, Float

features: frozenset[Feature] = frozenset(
    {"segments", "alibi", "distance_bias", "offsets", "deterministic", "dropout", "explicit_sharding"}
)


def unsupported_reason(q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str) -> str | None:
    """None: these features it has on any device, for arrays of any size and type."""
    return None


def forward(
    q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], spec: AttentionSpec
) -> tuple[Float[Array, "B S H V"], Float[Array, "B K G S T"]]:
    """The output, and the probabilities in the values' type, negative where they were dropped."""
    queries, keys = q.shape[1], k.shape[1]
    logits = _product(_scaled(q, k, spec), k, jnp.float32)
    for bias in (alibi_bias(spec, queries, keys), distance_bias(spec, queries, keys)):
        logits = logits if bias is None else logits + _by_group(bias, 0, k)
    attends = allowed(spec, queries, keys)[:, None, None]
    logits = jnp.where(attends, logits, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(logits, -1).astype(v.dtype)
    if not _every_query_attends(spec, queries, keys):
        probabilities = jnp.where(attends.any(-1, keepdims=True), probabilities, 0)
    mask = kept(spec, queries, keys)
    if mask is None:
        return _by_head(_weigh(probabilities, v), q), probabilities
    mask = _by_group(mask, 1, k)
    out = _by_head(_weigh(drop(probabilities, mask, spec.dropout_rate), v), q)
    return out, jnp.where(mask, probabilities, -probabilities)


def backward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    statistics: Float[Array, "B K G S T"],
    delta: None,
    dout: Float[Array, "B S H V"],
    spec: AttentionSpec,
) -> tuple[Array, ...]:
    """Gradients of queries, keys, values, and of a bias by distance; `statistics` are the forward's probabilities."""
    probabilities = weights = statistics
    mask = None
    if spec.dropout_rate:
        probabilities, mask = jnp.abs(statistics), statistics > 0
        weights = drop(probabilities, mask, spec.dropout_rate)
    # the products' own transposes: those written out as einsums cost a CPU more copies
    pulled: Array
    pulled, dv = jax.vjp(_weigh, weights, v)[1](_by_group(dout, 2, v))
    if mask is not None:
        pulled = drop(pulled, mask, spec.dropout_rate)
    probabilities, pulled = probabilities.astype(jnp.float32), pulled.astype(jnp.float32)
    dlogits = probabilities * (pulled - jnp.sum(pulled * probabilities, -1, keepdims=True))
    product = functools.partial(_product, dtype=q.dtype)
    dscaled, dk = jax.vjp(product, _scaled(q, k, spec), k)[1](dlogits.astype(q.dtype))
    found = _by_head(dscaled * _scale(q, spec), q), dk, dv
    if spec.distance_bias is None:
        return found

    def bias(table: Array) -> Float[Array, "K G S T"]:
        matrix = distance_bias(replace(spec, distance_bias=table), q.shape[1], k.shape[1])
        assert matrix is not None
        return _by_group(matrix, 0, k)

    return *found, *jax.vjp(bias, spec.distance_bias)[1](dlogits.sum(0))


def _scale(q: Array, spec: AttentionSpec) -> Array:
    return jnp.asarray(spec.scale(q.shape[-1]), q.dtype)


def _scaled(q: Array, k: Array, spec: AttentionSpec) -> Float[Array, "B S K G D"]:
    """Queries times the scale, by the key/value head that they read."""
    return _by_group(q, 2, k) * _scale(q, spec)


def _by_group(x: Array, axis: int, k: Array) -> Array:
    """`x` with its query heads as [key/value head, its group], split over the mesh as the heads of `k` are."""
    shape = (*x.shape[:axis], k.shape[2], x.shape[axis] // k.shape[2], *x.shape[axis + 1 :])
    of_x, of_k = jax.typeof(x).sharding, jax.typeof(k).sharding
    return _reshape(x, shape, (*of_x.spec[:axis], of_k.spec[2], None, *of_x.spec[axis + 1 :]))


def _by_head(x: Float[Array, "B S K G D"], q: Array) -> Float[Array, "B S H D"]:
    """The inverse, split as `q` is."""
    return _reshape(x, (*q.shape[:3], x.shape[-1]), jax.typeof(q).sharding.spec)


def _reshape(x: Array, shape: tuple[int, ...], axes: Iterable[Any]) -> Array:
    """`x` in a shape whose Explicit axes are given: JAX would lose those of a dimension of one."""
    if AxisType.Explicit not in jax.typeof(x).sharding.mesh.axis_types:
        return x.reshape(shape)
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(*axes))


def _product(scaled: Array, k: Array, dtype: DTypeLike) -> Float[Array, "B K G S T"]:
    return jnp.einsum("bskgd,btkd->bkgst", scaled, k, preferred_element_type=dtype)


def _weigh(weights: Array, v: Array) -> Float[Array, "B S K G V"]:
    return jnp.einsum("bkgst,btkv->bskgv", weights, v)


def _every_query_attends(spec: AttentionSpec, queries: int, keys: int) -> bool:
    """Whether each query surely attends to something, were it the key at its own position alone."""
    if not (isinstance(spec.q_offset, int) and isinstance(spec.kv_offset, int)) or spec.q_segment_ids is not None:
        return False
    first = spec.q_offset - spec.kv_offset
    return first >= 0 and first + queries <= keys

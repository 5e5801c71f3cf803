"""Attention as its definition says, in float32 with the whole matrix of scores: what the others are held to.

Forward and backward are the mathematics written out (FlashAttention, 2205.14135, section B), with no blocks.
Memory is quadratic in the sequence.
"""

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.dropout import kept
from jaxtron.kernels.attention.spec import (
    AttentionSpec,
    Feature,
    Heads,
    alibi_bias,
    allowed,
    distance_bias,
    distances,
)
from jaxtron.kernels.dropout import drop
from jaxtron.typing import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


features: frozenset[Feature] = frozenset(
    {"segments", "soft_cap", "alibi", "distance_bias", "offsets", "deterministic", "dropout", "log_sum_exp"}
)


def unsupported_reason(q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str) -> str | None:
    """None: these features it has on any device, for arrays of any size and type."""
    return None


def forward(
    q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], spec: AttentionSpec
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """What is attended to in `q`'s type, and the log-sum-exp of the scores in float32."""
    q32, k32, v32 = _per_query_head(q, k, v)
    attends = allowed(spec, q.shape[1], k.shape[1])[:, None]
    scores, _ = _scores(q32, k32, spec)
    scores = jnp.where(attends, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, -1)
    weights = jnp.where(attends, jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None]), 0)
    out = jnp.einsum("bhst,bthv->bshv", _dropped(weights, spec), v32, precision=HIGHEST)
    return out.astype(q.dtype), lse


def backward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    dout: Float[Array, "B S H V"],
    spec: AttentionSpec,
) -> tuple[Array, ...]:
    """Gradients of queries, keys, values, and of a bias by distance, given `delta = sum(dout * out) - dlse`."""
    q32, k32, v32 = _per_query_head(q, k, v)
    dout = dout.astype(jnp.float32)
    attends = allowed(spec, q.shape[1], k.shape[1])[:, None]
    scores, slope = _scores(q32, k32, spec)
    weights = jnp.where(attends, jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None]), 0)
    dvalue = jnp.einsum("bhst,bshv->bthv", _dropped(weights, spec), dout, precision=HIGHEST)
    dweights = _dropped(jnp.einsum("bshv,bthv->bhst", dout, v32, precision=HIGHEST), spec)
    dscores = jnp.where(attends, weights * (dweights - delta[..., None]), 0)
    # of q . k: through the cap and the scale
    dproduct = dscores * slope
    dquery = jnp.einsum("bhst,bthd->bshd", dproduct, k32, precision=HIGHEST)
    dkey = jnp.einsum("bhst,bshd->bthd", dproduct, q32, precision=HIGHEST)
    found = dquery.astype(q.dtype), _per_kv_head(dkey, k), _per_kv_head(dvalue, v)
    return found if spec.distance_bias is None else (*found, _by_distance(dscores, spec))


def _by_distance(dscores: Float[Array, "B H S T"], spec: AttentionSpec) -> Float[Array, "H N"]:
    """Sums over all pairs of a query and a key that read the same number of the table."""
    assert spec.distance_bias is not None
    known = spec.distance_bias.shape[1]
    place = jnp.clip(known // 2 - distances(spec, *dscores.shape[2:]), 0, known - 1)
    return jnp.einsum("bhst,stn->hn", dscores, jax.nn.one_hot(place, known), precision=HIGHEST)


def _scores(q: Array, k: Array, spec: AttentionSpec) -> tuple[Array, Array | float]:
    """Scores [B, H, S, T] before masking, and their derivative by q . k."""
    factor = spec.scale(q.shape[-1])
    scores = jnp.einsum("bshd,bthd->bhst", q, k, precision=HIGHEST) * factor
    derivative: Array | float = factor
    if spec.logits_soft_cap is not None:
        turned = jnp.tanh(scores / spec.logits_soft_cap)
        scores, derivative = spec.logits_soft_cap * turned, factor * (1 - turned**2)
    for bias in (alibi_bias(spec, q.shape[1], k.shape[1]), distance_bias(spec, q.shape[1], k.shape[1])):
        scores = scores if bias is None else scores + bias
    return scores, derivative


def _dropped(x: Float[Array, "B H S T"], spec: AttentionSpec) -> Float[Array, "B H S T"]:
    """Probabilities, or their gradients, without those that are dropped."""
    mask = kept(spec, *x.shape[2:])
    return x if mask is None else drop(x, mask, spec.dropout_rate)


def _per_query_head(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """All in float32, with keys and values copied to each query head that reads them."""
    groups = q.shape[2] // k.shape[2]
    copies = []
    for x in (k, v):
        rows, length, heads, dim = x.shape
        # plain shapes, which keep an Explicit sharding of the heads
        x = jnp.broadcast_to(x.astype(jnp.float32)[:, :, :, None], (rows, length, heads, groups, dim))
        copies.append(x.reshape(rows, length, heads * groups, dim))
    return q.astype(jnp.float32), copies[0], copies[1]


def _per_kv_head(gradient: Array, x: Array) -> Array:
    """The transpose of `_per_query_head`, in `x`'s type."""
    rows, length, heads, dim = x.shape
    return gradient.reshape(rows, length, heads, -1, dim).sum(3).astype(x.dtype)

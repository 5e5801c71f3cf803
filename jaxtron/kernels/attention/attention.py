"""Attention's public function, which models call: one derivative for all implementations."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtron.config import UserError
from jaxtron.kernels.attention.spec import AttentionSpec, Feature, Heads, check_shapes
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Float, PyTree

# names of what the backward needs beside its inputs, for policies of recomputation; the last of what has no log-sum-exp
# and may be quadratic in the sequence
OUT, STATISTICS, SCORES = "attention_out", "attention_statistics", "attention_scores"
# what is said of an implementation without a feature
MISSING: dict[Feature, str] = {
    "segments": "it knows no segments (packed documents)",
    "soft_cap": "it knows no soft cap",
    "alibi": "it knows no slopes (ALiBi)",
    "distance_bias": "it knows no bias by distance (T5)",
    "deterministic": "its backward adds up in any order",
    "dropout": "it drops no probabilities",
    "log_sum_exp": "it returns no log-sum-exp, which sinks and context parallelism need",
    "offsets": "its positions start at 0: it knows no offsets of queries and keys",
}


@runtime_checkable
class Implementation(Protocol):
    """One way to compute attention; a module of this package is one."""

    @property
    def features(self) -> frozenset[Feature]:
        """What it can do beside plain attention."""
        ...

    def unsupported_reason(self, q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str) -> str | None:
        """Why it cannot compute arrays of these shapes and types on devices of this kind (`jax.Device.device_kind`),
        its features aside; none: it can."""
        ...

    def forward(
        self, q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], spec: AttentionSpec, /
    ) -> tuple[Float[Array, "B S H V"], PyTree]:
        """The output in the type of `q`, and statistics for the backward.

        With the feature `log_sum_exp` they are the logits' natural log-sum-exp [B, H, S] in float32, else what the
        implementation likes, its arrays [B, heads, ...].
        """
        ...

    def backward(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K V"],
        statistics: PyTree,
        delta: Any,
        dout: Float[Array, "B S H V"],
        spec: AttentionSpec,
        /,
    ) -> tuple[Array, ...]:
        """Gradients of queries [B, S, H, D], keys [B, T, K, D] and values [B, T, K, V]; where the spec has a
        `distance_bias`, also of that, in float32 [H, N].

        `delta` is rowsum(dout * out) less the gradient of the log-sum-exp, float32 [B, H, S]; none without that
        feature.
        """
        ...


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    spec: AttentionSpec,
    implementation: Implementation,
    *,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"] | None]:
    """Sums of values weighted by the softmax of the logits, and the logits' natural log-sum-exp if it can be told.

    `sinks` are logits that take part in each head's softmax without a value (gpt-oss, 2508.10925, section 2.1); the
    log-sum-exp includes them. A row that may attend to nothing is 0, its log-sum-exp -inf. `UserError` for sizes that
    do not fit and for what the implementation has no feature for.
    """
    if spec.dropout_seeds is None:
        spec = dataclasses.replace(spec, dropout_rate=0.0)
    check_shapes(q, k, v, spec, sinks)
    missing = missing_feature(implementation, spec, needs_log_sum_exp=sinks is not None)
    if missing is not None:
        raise UserError(f"this implementation of attention cannot: {missing}")
    if spec.distance_bias is not None:
        spec = dataclasses.replace(spec, distance_bias=spec.distance_bias.astype(jnp.float32))
    known, arrays = spec.split()
    # here, where it is differentiated, and not in the implementations: gradients are summed over what did not vary
    q, k, v, arrays, sinks = vary_alike((q, k, v, arrays, sinks))
    attended: tuple[Array, Array | None] = _attend(implementation, known, q, k, v, arrays)
    out, lse = attended
    if sinks is not None and lse is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out, lse


def missing_feature(implementation: Implementation, spec: AttentionSpec, *, needs_log_sum_exp: bool) -> str | None:
    """What the implementation lacks of the features that a spec asks for, in words; none: nothing."""
    needed = spec.features | ({"log_sum_exp"} if needs_log_sum_exp else set())
    return next((words for name, words in MISSING.items() if name in needed - implementation.features), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    implementation: Implementation, known: AttentionSpec, q: Array, k: Array, v: Array, arrays: dict[str, Array]
) -> tuple[Array, Array | None]:
    out, statistics = implementation.forward(q, k, v, known.with_arrays(arrays))
    return out, statistics if "log_sum_exp" in implementation.features else None


def _forward(
    implementation: Implementation, known: AttentionSpec, q: Array, k: Array, v: Array, arrays: dict[str, Array]
) -> tuple[tuple[Array, Array | None], tuple]:
    out, statistics = implementation.forward(q, k, v, known.with_arrays(arrays))
    if "log_sum_exp" not in implementation.features:
        statistics = jax.tree.map(lambda array: checkpoint_name(array, SCORES), statistics)
        return (out, None), (q, k, v, None, statistics, arrays)
    out, statistics = checkpoint_name(out, OUT), checkpoint_name(statistics, STATISTICS)
    return (out, statistics), (q, k, v, out, statistics, arrays)


def _backward(
    implementation: Implementation, known: AttentionSpec, residuals: tuple, cotangents: tuple[Array, Array | None]
) -> tuple[Array, Array, Array, dict[str, Array | None]]:
    q, k, v, out, statistics, arrays = residuals
    dout, dlse = cotangents
    delta = None
    if out is not None and dlse is not None:
        delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2) - dlse
    dq, dk, dv, *others = implementation.backward(q, k, v, statistics, delta, dout, known.with_arrays(arrays))
    found: dict[str, Array | None] = dict.fromkeys(arrays)
    if "distance_bias" in arrays:
        (found["distance_bias"],) = others
    return dq, dk, dv, found


_attend.defvjp(_forward, _backward)


def with_sinks(
    out: Float[Array, "B S H V"], lse: Float[Array, "B H S"], sinks: Float[Array, " H"]
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """Softmax with one more logit a head, from the softmax without: its share of the sum is taken off."""
    sinks = sinks.astype(jnp.float32)[:, None]
    share = jax.nn.sigmoid(lse - sinks).swapaxes(1, 2)[..., None]
    return (out.astype(jnp.float32) * share).astype(out.dtype), jnp.logaddexp(lse, sinks)

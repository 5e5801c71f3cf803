"""Which implementation computes attention.

- `mosaic`: our kernels for Hopper.
- `cudnn`: other NVIDIA GPUs; where nobody asks for the log-sum-exp, which it cannot return, and nothing is dropped.
- `materialized`: plain JAX with the probabilities in memory; for short sequences.
- `xla`: plain JAX with memory linear in the sequence, anywhere.
- `reference`: plain mathematics in float32, with quadratic memory; never selected by `auto`.
"""

from collections.abc import Mapping
from dataclasses import replace

from jaxtron.kernels.attention import chunked, cudnn, materialized, mosaic, reference
from jaxtron.kernels.attention.attention import Implementation, missing_feature
from jaxtron.kernels.attention.spec import AttentionSpec, Heads
from jaxtron.kernels.selection import Backend, select

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "mosaic": mosaic,
    "cudnn": cudnn,
    "xla": chunked,
    "materialized": materialized,
    "reference": reference,
}
# keys up to which probabilities in memory are affordable, and faster than tiles in plain JAX
SHORT = 4096


def select_backend(
    name: str, q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str, *, needs_log_sum_exp: bool
) -> Backend[Implementation]:
    """The backend for queries, keys and values of these shapes on devices of this kind (`jax.Device.device_kind`).

    `UserError` where the one that was named cannot; `auto` falls through to the next that can. The spec's arrays may be
    `jax.ShapeDtypeStruct`s.
    """

    def unsupported_reason(implementation: Implementation) -> str | None:
        reason = implementation.unsupported_reason(q, k, v, spec, device_kind)
        return reason or missing_feature(implementation, spec, needs_log_sum_exp=needs_log_sum_exp)

    plain = ("materialized", "xla") if k.shape[1] <= SHORT else ("xla", "materialized")
    found = select(
        name,
        IMPLEMENTATIONS,
        unsupported_reason,
        device_kind,
        what="attention",
        setting="model.attention.implementation",
        order=("mosaic", "cudnn", *plain),
    )
    if name != "auto" or found.name != "materialized":
        return found
    asked = ["drops probabilities"] if spec.dropout_rate else []
    asked += ["knows biases by distance"] if spec.distance_bias is not None else []
    that = f" that {' and '.join(asked)}" if asked else ""
    return replace(found, reason=f"attention: materialized (short sequences, and no kernel for {device_kind}{that})")

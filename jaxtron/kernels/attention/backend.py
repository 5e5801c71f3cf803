"""Which implementation computes attention, selected once, before anything is traced: the one named, or the fastest.

- `mosaic`: our kernels for Hopper.
- `cudnn`: other NVIDIA GPUs; where nobody asks for the log-sum-exp, which it cannot return.
- `materialized`: plain JAX with the probabilities in memory; for short sequences, and the only one that drops them.
- `xla`: plain JAX with memory linear in the sequence, anywhere.
- `reference`: plain mathematics in float32, with quadratic memory; never selected by `auto`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtron.config import UserError
from jaxtron.kernels.attention import chunked, cudnn, materialized, mosaic, reference
from jaxtron.kernels.attention.attention import Implementation, missing_feature
from jaxtron.kernels.attention.spec import AttentionSpec, Heads

IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "mosaic": mosaic,
    "cudnn": cudnn,
    "xla": chunked,
    "materialized": materialized,
    "reference": reference,
}
# keys up to which probabilities in memory are affordable, and faster than tiles in plain JAX
SHORT = 4096


@dataclass(frozen=True)
class Backend:
    """An implementation by name, and one line that says which it is and why."""

    name: str
    reason: str

    @property
    def implementation(self) -> Implementation:
        """What computes."""
        return IMPLEMENTATIONS[self.name]


def select_backend(
    name: str, q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str, *, needs_log_sum_exp: bool
) -> Backend:
    """The backend for queries, keys and values of these shapes on devices of this kind (`jax.Device.device_kind`).

    `UserError` where the one that was named cannot; `auto` falls through to the next that can. The spec's arrays may be
    `jax.ShapeDtypeStruct`s.
    """

    def unsupported_reason(name: str) -> str | None:
        implementation = IMPLEMENTATIONS[name]
        reason = implementation.unsupported_reason(q, k, v, spec, device_kind)
        return reason or missing_feature(implementation, spec, needs_log_sum_exp=needs_log_sum_exp)

    if name != "auto":
        if name not in IMPLEMENTATIONS:
            known = ", ".join(["auto", *IMPLEMENTATIONS])
            raise UserError(f"model.attention.implementation {name} is not known: use one of {known}")
        reason = unsupported_reason(name)
        if reason is not None:
            raise UserError(f"model.attention.implementation {name} cannot: {reason}; use auto")
        return Backend(name, f"attention: {name}, as asked")
    is_short = k.shape[1] <= SHORT
    passed = []
    for name in ("mosaic", "cudnn", *(("materialized", "xla") if is_short else ("xla", "materialized"))):
        reason = unsupported_reason(name)
        if reason is None:
            return Backend(name, _reason(name, spec, device_kind, passed))
        passed.append(f"not {name}: {reason}")
    raise UserError(f"no implementation of attention can do this on {device_kind}: {'; '.join(passed)}")


def _reason(name: str, spec: AttentionSpec, device_kind: str, passed: list[str]) -> str:
    """The line of what `auto` selected after it had passed over others."""
    if name == "materialized":
        why = "probabilities are dropped" if spec.dropout_rate else f"short sequences, and no kernel for {device_kind}"
        return f"attention: materialized ({why})"
    return "; ".join([f"attention: {name}, the fastest that runs on {device_kind}", *passed])

"""Which implementation computes the gated delta rule.

- `xla`: plain JAX, one chunk of the sequence after the other, anywhere.
- `reference`: plain mathematics, one position after the other; never selected by `auto`.
"""

from collections.abc import Mapping

from jaxtron.kernels.gated_delta import reference, xla
from jaxtron.kernels.gated_delta.gated_delta import GatedDeltaRule
from jaxtron.kernels.selection import Backend, select

IMPLEMENTATIONS: Mapping[str, GatedDeltaRule] = {"xla": xla, "reference": reference}


def select_backend(name: str, device_kind: str) -> Backend[GatedDeltaRule]:
    """The backend on devices of this kind (`jax.Device.device_kind`); `UserError` where none has the name."""
    return select(
        name,
        IMPLEMENTATIONS,
        lambda _: None,
        device_kind,
        what="gated delta rule",
        setting="model.delta.implementation",
    )

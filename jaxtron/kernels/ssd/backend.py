"""Which implementation computes state-space duality.

- `mosaic`: our kernels for Hopper.
- `xla`: plain JAX, one chunk of the sequence after the other, anywhere.
- `reference`: plain mathematics, one position after the other; never selected by `auto`.
"""

from collections.abc import Mapping

from jaxtron.kernels.selection import Backend, select
from jaxtron.kernels.ssd import mosaic, reference, xla
from jaxtron.kernels.ssd.spec import Operand
from jaxtron.kernels.ssd.ssd import StateSpaceDuality

IMPLEMENTATIONS: Mapping[str, StateSpaceDuality] = {"mosaic": mosaic, "xla": xla, "reference": reference}


def select_backend(name: str, x: Operand, B: Operand, device_kind: str) -> Backend[StateSpaceDuality]:
    """The backend for x [B, S, H, P] and B [B, S, G, N] on devices of this kind (`jax.Device.device_kind`).

    `UserError` where the one that was named cannot; `auto` falls through to the next that can.
    """
    return select(
        name,
        IMPLEMENTATIONS,
        lambda kernel: kernel.unsupported_reason(x, B, device_kind),
        device_kind,
        what="state-space duality",
        setting="model.mamba.implementation",
    )

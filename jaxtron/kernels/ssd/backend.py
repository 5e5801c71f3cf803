"""Which implementation computes state-space duality, selected before anything is traced: the one named, or the fastest.

- `mosaic`: our kernels for Hopper.
- `xla`: plain JAX, one chunk of the sequence after the other, anywhere.
- `reference`: plain mathematics, one position after the other; never selected by `auto`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtron.config import UserError
from jaxtron.kernels.ssd import mosaic, reference, xla
from jaxtron.kernels.ssd.spec import Operand
from jaxtron.kernels.ssd.ssd import StateSpaceDuality

IMPLEMENTATIONS: Mapping[str, StateSpaceDuality] = {"mosaic": mosaic, "xla": xla, "reference": reference}
SETTING = "model.mamba.implementation"
"""The setting that names one."""


@dataclass(frozen=True)
class ScanBackend:
    """An implementation by name, and one line that says which it is and why."""

    name: str
    reason: str

    @property
    def implementation(self) -> StateSpaceDuality:
        """What computes."""
        return IMPLEMENTATIONS[self.name]


def select_backend(name: str, x: Operand, B: Operand, device_kind: str) -> ScanBackend:
    """The backend for x [B, S, H, P] and B [B, S, G, N] on devices of this kind (`jax.Device.device_kind`).

    `UserError` where the one that was named cannot; `auto` falls through to the next that can.
    """
    if name != "auto":
        if name not in IMPLEMENTATIONS:
            raise UserError(f"{SETTING} {name} is not known: use one of {', '.join(['auto', *IMPLEMENTATIONS])}")
        reason = IMPLEMENTATIONS[name].unsupported_reason(x, B, device_kind)
        if reason is not None:
            raise UserError(f"{SETTING} {name} cannot: {reason}; use auto")
        return ScanBackend(name, f"state-space duality: {name}, as asked")
    passed = []
    for name in IMPLEMENTATIONS:
        reason = IMPLEMENTATIONS[name].unsupported_reason(x, B, device_kind)
        if reason is None:
            why = f"state-space duality: {name}, the fastest that runs on {device_kind}"
            return ScanBackend(name, "; ".join([why, *passed]))
        passed.append(f"not {name}: {reason}")
    raise AssertionError("xla computes anything")

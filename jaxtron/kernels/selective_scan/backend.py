"""Which implementation computes the selective scan.

- `xla`: plain JAX, one chunk of the sequence after the other, anywhere.
- `reference`: plain mathematics, one position after the other; never selected by `auto`.
"""

from collections.abc import Mapping

from jaxtron.kernels.selection import Backend, select
from jaxtron.kernels.selective_scan import reference, xla
from jaxtron.kernels.selective_scan.selective_scan import SelectiveScan

IMPLEMENTATIONS: Mapping[str, SelectiveScan] = {"xla": xla, "reference": reference}


def select_backend(name: str, device_kind: str) -> Backend[SelectiveScan]:
    """The backend on devices of this kind (`jax.Device.device_kind`); `UserError` where none has the name."""
    return select(
        name, IMPLEMENTATIONS, lambda _: None, device_kind, what="selective scan", setting="model.mamba.implementation"
    )

"""Which implementation computes the selective scan: the one named, or the fastest.

- `xla`: plain JAX, one chunk of the sequence after the other, anywhere.
- `reference`: plain mathematics, one position after the other; never selected by `auto`.
"""

from collections.abc import Mapping

from jaxtron.config import UserError
from jaxtron.kernels.selective_scan import reference, xla
from jaxtron.kernels.selective_scan.selective_scan import SelectiveScan

IMPLEMENTATIONS: Mapping[str, SelectiveScan] = {"xla": xla, "reference": reference}


def select(name: str) -> SelectiveScan:
    """What `model.mamba.implementation` names; `UserError` where there is none."""
    if name != "auto" and name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UserError(f"model.mamba.implementation {name}: the selective scan (m) has {known}; use one of them")
    return IMPLEMENTATIONS["xla" if name == "auto" else name]


def reason(name: str) -> str:
    """One line that says which it is and why."""
    return (
        f"selective scan: {name}, as asked" if name != "auto" else "selective scan: xla, for it has no kernel of a GPU"
    )

"""Which implementation computes the gated delta rule: the one named, or the fastest.

- `xla`: plain JAX, one chunk of the sequence after the other, anywhere.
- `reference`: plain mathematics, one position after the other; never selected by `auto`.
"""

from collections.abc import Mapping

from jaxtron.kernels.gated_delta import reference, xla
from jaxtron.kernels.gated_delta.config import DeltaImplementation
from jaxtron.kernels.gated_delta.gated_delta import GatedDeltaRule

IMPLEMENTATIONS: Mapping[str, GatedDeltaRule] = {"xla": xla, "reference": reference}


def select(name: DeltaImplementation) -> GatedDeltaRule:
    """What `model.delta.implementation` names."""
    return IMPLEMENTATIONS["xla" if name == "auto" else name]


def reason(name: str) -> str:
    """One line that says which it is and why."""
    return (
        f"gated delta rule: {name}, as asked"
        if name != "auto"
        else "gated delta rule: xla, for it has no kernel of a GPU"
    )

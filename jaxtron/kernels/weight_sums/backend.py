"""Which implementation adds weight gradients to their sums.

- `mosaic`: our kernel for Hopper, which adds what it multiplies; products that it does not take are added as by `xla`.
- `xla`: a product in the step's precision first, then a sum of its own; anywhere.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.spec import TILE
from jaxtron.kernels.selection import Backend, select
from jaxtron.kernels.weight_sums import mosaic
from jaxtron.kernels.weight_sums.spec import WeightSums
from jaxtron.typing import DTypeLike

IMPLEMENTATIONS: Mapping[str, WeightSums | None] = {"mosaic": mosaic, "xla": None}


def select_backend(name: str, rows: int, dtype: DTypeLike, device_kind: str) -> Backend[WeightSums | None]:
    """The backend for products over so many rows of this type on devices of this kind; `UserError` where the one named
    cannot."""
    operand = jax.ShapeDtypeStruct((rows, TILE), jnp.dtype(dtype))
    return select(
        name,
        IMPLEMENTATIONS,
        lambda sums: sums and sums.unsupported_reason(operand, operand, device_kind),
        device_kind,
        what="sums of weight gradients",
        setting="train.gradient_sums",
    )

"""Which implementation computes grouped products, selected before anything is traced: the one named, or the fastest.

- `mosaic`: our kernels for Hopper.
- `xla`: plain JAX, one tile of rows after the other, anywhere.
- `reference`: plain mathematics, every expert times all rows; never selected by `auto`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtron.config import UserError
from jaxtron.kernels.grouped_matmul import mosaic, reference, xla
from jaxtron.kernels.grouped_matmul.grouped_matmul import GroupedProducts
from jaxtron.kernels.grouped_matmul.spec import TILE, Operand
from jaxtron.typing import DTypeLike

IMPLEMENTATIONS: Mapping[str, GroupedProducts] = {"mosaic": mosaic, "xla": xla, "reference": reference}
SETTING = "model.moe.implementation"
"""The setting that names one."""


@dataclass(frozen=True)
class ProductsBackend:
    """An implementation by name, and one line that says which it is and why."""

    name: str
    reason: str

    @property
    def implementation(self) -> GroupedProducts:
        """What computes."""
        return IMPLEMENTATIONS[self.name]


def has_kernel(dtype: DTypeLike, device_kind: str) -> bool:
    """Whether devices of this kind have a kernel that multiplies numbers of this type as fast as whole products: the
    loop over tiles on a CPU, the kernels for Hopper."""
    if device_kind == "cpu":
        return True
    rows = jax.ShapeDtypeStruct((TILE, TILE), jnp.dtype(dtype))
    return mosaic.unsupported_reason(rows, jax.ShapeDtypeStruct((1, TILE, TILE), rows.dtype), device_kind) is None


def select_backend(name: str, rows: Operand, kernel: Operand, device_kind: str) -> ProductsBackend:
    """The backend for rows [R, I] and kernels [N, I, O] on devices of this kind (`jax.Device.device_kind`).

    It is of all three products. `UserError` where the one that was named cannot; `auto` falls through to the next that
    can.
    """
    if name != "auto":
        if name not in IMPLEMENTATIONS:
            raise UserError(f"{SETTING} {name} is not known: use one of {', '.join(['auto', *IMPLEMENTATIONS])}")
        reason = IMPLEMENTATIONS[name].unsupported_reason(rows, kernel, device_kind)
        if reason is not None:
            raise UserError(f"{SETTING} {name} cannot: {reason}; use auto")
        return ProductsBackend(name, f"grouped products: {name}, as asked")
    passed = []
    for name in IMPLEMENTATIONS:
        reason = IMPLEMENTATIONS[name].unsupported_reason(rows, kernel, device_kind)
        if reason is None:
            why = f"grouped products: {name}, the fastest that runs on {device_kind}"
            return ProductsBackend(name, "; ".join([why, *passed]))
        passed.append(f"not {name}: {reason}")
    raise AssertionError("xla computes anything")

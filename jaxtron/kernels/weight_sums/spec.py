"""What is computed: float32 sums [L, I, O] of weight gradients, to one of which `x^T cotangent` is added."""

from typing import Protocol, runtime_checkable

import jax

from jaxtron.typing import Array, Float, Int

Operand = Array | jax.ShapeDtypeStruct


@runtime_checkable
class WeightSums(Protocol):
    """One way to compute it; a module of this package is one."""

    def unsupported_reason(self, x: Operand, cotangent: Operand, device_kind: str, /) -> str | None:
        """Why it cannot, or should not, with arrays [R, I] and [R, O] of these shapes and types on devices of this kind
        (`jax.Device.device_kind`); none: it can."""
        ...

    def add(
        self,
        sums: Float[Array, "L I O"],
        x: Float[Array, "R I"],
        cotangent: Float[Array, "R O"],
        slot: Int[Array, ""],
        /,
    ) -> Float[Array, "L I O"]:
        """`sums` with the product added at `slot`, never rounded to the operands' type."""
        ...

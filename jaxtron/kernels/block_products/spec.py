"""What is computed: products of e4m3 numbers, each block of 128 of what is contracted with scales of its own.

As DeepSeek-V3 has it (2412.19437, 3.3): an activation's tile is 1 x 128, a weight's block 128 x 128, and the sum over
blocks is one of float32 numbers. Scales are powers of two, so that numbers times their scale are exact in bfloat16 too.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax

from jaxtron.typing import Array, DTypeLike, Float

# numbers that have a scale together, along what is contracted
BLOCK = 128


class Rounded(NamedTuple):
    """Matrices side by side along what is contracted: `L` parts, each with `R` of it, whose blocks begin anew."""

    values: Float[Array, "L M R"]
    scales: Float[Array, "L blocks tiles"]
    """What the values are to be multiplied by: `tiles` is M, or M in blocks of 128, the last perhaps shorter."""


class Operand(NamedTuple):
    """Shapes of a `Rounded`."""

    values: jax.ShapeDtypeStruct
    scales: jax.ShapeDtypeStruct


@runtime_checkable
class BlockProducts(Protocol):
    """One way to compute them; a module of this package is one."""

    def unsupported_reason(self, left: Operand, right: Operand, dtype: DTypeLike, device_kind: str, /) -> str | None:
        """Why it cannot make products of such shapes in this type on devices of this kind (`jax.Device.device_kind`);
        none: it can."""
        ...

    def product(self, left: Rounded, right: Rounded, dtype: DTypeLike, /) -> Float[Array, "M N"]:
        """The sum over all that is contracted of both; the left's scales are of single rows."""
        ...

"""What one GPU executes in a slot of a schedule: products, streamed bytes and collectives.

Sizes are bytes and floating-point operations (FLOPs).
"""

from dataclasses import dataclass
from typing import Literal

CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Product:
    """`count` equal matrix products [m, k] x [k, n], of numbers `width` bytes wide.

    `output_width` is how many bytes move for one number of the output; 8 where it is added to a float32 sum.
    """

    m: float
    n: float
    k: float
    count: float = 1.0
    width: int = 2
    output_width: int = 2

    @property
    def flops(self) -> float:
        """Two for a multiplication with its addition."""
        return 2.0 * self.count * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Bytes that move if each operand is read and the output written once."""
        operands = self.width * (self.m * self.k + self.k * self.n)
        return self.count * (operands + self.output_width * self.m * self.n)


@dataclass(frozen=True)
class CollectiveWork:
    """`size` is the bytes of the whole array on one device; `purpose` says over which devices it runs and what part of
    it is hidden (plan/formula/timer.py: PURPOSES)."""

    kind: CollectiveKind
    size: float
    purpose: str
    count: float = 1.0


@dataclass(frozen=True)
class FusedKernel:
    """A kernel whose products run beside the `bytes` that it reads and writes, so that the longer of both counts."""

    flops: float
    bytes: float = 0.0


@dataclass(frozen=True)
class PhaseWork:
    """Operations of one slot on one device.

    `masked_flops` are those that a fused kernel does not run, or runs again, against the papers' formulas, which count
    the whole square of scores once.
    """

    products: tuple[Product, ...] = ()
    fused: tuple[FusedKernel, ...] = ()
    masked_flops: float = 0.0
    stream: float = 0.0
    kernels: int = 0
    collectives: tuple[CollectiveWork, ...] = ()

    def __add__(self, other: "PhaseWork") -> "PhaseWork":
        return PhaseWork(
            self.products + other.products,
            self.fused + other.fused,
            self.masked_flops + other.masked_flops,
            self.stream + other.stream,
            self.kernels + other.kernels,
            self.collectives + other.collectives,
        )

    @property
    def flops(self) -> float:
        """FLOPs as the papers count them: the whole square of scores, whatever a kernel leaves out."""
        return sum(one.flops for one in (*self.products, *self.fused)) + self.masked_flops


NOTHING = PhaseWork()


@dataclass(frozen=True)
class SlotWork:
    """What a piece of the model does in each slot of a microbatch; `weight` is part of the backward if not split."""

    forward: PhaseWork = NOTHING
    backward: PhaseWork = NOTHING
    weight: PhaseWork = NOTHING

    def __add__(self, other: "SlotWork") -> "SlotWork":
        return SlotWork(self.forward + other.forward, self.backward + other.backward, self.weight + other.weight)

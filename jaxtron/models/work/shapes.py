"""Sizes on a device, and what communication over the axes of the mesh follows from them."""

from dataclasses import dataclass

from jaxtron.models.work.operations import CollectiveKind, CollectiveWork, PhaseWork, SlotWork
from jaxtron.models.work.profile import Profile

# of a number in float32, and of a dropout's mask
FLOAT, MASK_BYTES = 4, 1


@dataclass(frozen=True)
class Shapes:
    """Sizes of a microbatch on one device, of which operations are made; stacks of other lengths have their own.

    It has n = b * s tokens on a device; letters are those of 2205.05198: h hidden, a heads, t tensor parts.
    """

    profile: Profile
    sizes: dict[str, int]
    """Devices by flag of either view of the mesh."""
    rows: float
    length: int
    """Of a whole sequence, in tokens."""
    gathered: int
    """Parts that weights are gathered from where they are used."""
    width: int
    """Bytes of an activation."""
    expert_gathered: int = 1
    """As `gathered`, of experts."""
    grouped_products: bool = False
    """Whether the device has a kernel of grouped products (layers/moe/config.py)."""

    @property
    def tensor(self) -> int:
        """Parts of heads, MLP and vocabulary."""
        return self.sizes["tensor"]

    @property
    def parts(self) -> int:
        """Devices that a sequence lies on."""
        return self.sizes["context"]

    @property
    def tokens(self) -> float:
        """Of a microbatch on a device."""
        return self.rows * self.length / self.parts

    @property
    def own_tokens(self) -> float:
        """Those whose norms, dropout and residuals this device computes."""
        return self.tokens / self.tensor if self.profile.sequence_sharded else self.tokens

    def stream_bytes(self, hidden: float) -> float:
        """Of a residual stream of so many channels, a microbatch's on a device, whole along `tensor`."""
        return self.tokens * hidden * self.width

    def own_bytes(self, hidden: float) -> float:
        """Of the part of a residual stream whose norms, dropout and sums this device computes."""
        return self.own_tokens * hidden * self.width


def gather(shapes: Shapes, size: float, purpose: str = "tensor") -> tuple[CollectiveWork, ...]:
    """The sequence's parts put together; nothing where it was not split."""
    return over_tensor(shapes, "all_gather", size, purpose) if shapes.profile.sequence_sharded else ()


def scatter(shapes: Shapes, size: float) -> tuple[CollectiveWork, ...]:
    """Partial sums added: to parts of the sequence, or to the whole of it everywhere."""
    return over_tensor(shapes, "reduce_scatter" if shapes.profile.sequence_sharded else "all_reduce", size)


def over_tensor(
    shapes: Shapes, kind: CollectiveKind, size: float, purpose: str = "tensor"
) -> tuple[CollectiveWork, ...]:
    """A collective of tensor parallelism; nothing on one part."""
    return (CollectiveWork(kind, size, purpose),) if shapes.tensor > 1 else ()


def gathered_weights(shapes: Shapes, parameters: float, experts: float = 0.0) -> SlotWork:
    """Weights gathered at use in 16 bits, again in the backward, and their gradients reduced there (ZeRO-3); apart from
    others those of experts."""
    return _gathered("fsdp", shapes.gathered, parameters * shapes.width) + _gathered(
        "expert_fsdp", shapes.expert_gathered, experts * shapes.width
    )


def _gathered(purpose: str, parts: int, size: float) -> SlotWork:
    if parts == 1 or not size:
        return SlotWork()
    gathered = PhaseWork(collectives=(CollectiveWork("all_gather", size, purpose),))
    return SlotWork(gathered, gathered, PhaseWork(collectives=(CollectiveWork("reduce_scatter", size, purpose),)))

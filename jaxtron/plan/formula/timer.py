"""What a piece of work costs on a machine whose devices lie on a mesh: seconds, and what of them nothing hides."""

from dataclasses import dataclass, fields
from typing import NamedTuple

from jaxtron.models.work.operations import CollectiveWork, PhaseWork
from jaxtron.models.work.profile import Profile
from jaxtron.plan.machine import Group, Machine, axes_group
from jaxtron.sharding.config import Zero
from jaxtron.sharding.folding import SHARD_FLAGS, Refinement


class Purpose(NamedTuple):
    """What a collective is for: the field of `Overlap` that hides it in a slot, that of `SlotCost` with what is left,
    and the flags along which it runs; those that run once a step have no such fields."""

    hides: str | None
    spent: str | None
    flags: tuple[str, ...]


PURPOSES = {
    "tensor": Purpose("tensor", "tensor", ("tensor",)),
    "regather": Purpose("regather", "tensor", ("tensor",)),
    "fsdp": Purpose("fsdp", "fsdp", ("fsdp",)),
    "expert_fsdp": Purpose("fsdp", "fsdp", ("expert_data",)),
    "context": Purpose("context", "context", ("context",)),
    "expert": Purpose("expert", "expert", ("expert",)),
    "experts": Purpose("expert", "expert", ("expert", "expert_tensor")),
    "expert_tensor": Purpose("expert", "expert", ("expert_tensor",)),
    # gradients are summed over the parts of a sequence too
    "data": Purpose(None, None, ("data", "context")),
    "expert_data": Purpose(None, None, ("expert_data",)),
    "pipe": Purpose(None, None, ("pipe",)),
}


@dataclass(frozen=True)
class SlotCost:
    """Seconds of a slot by what they are spent on; communication is what no product hides."""

    products: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    fsdp: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    pipe: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "SlotCost") -> "SlotCost":
        return SlotCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(SlotCost)))

    def __mul__(self, times: float) -> "SlotCost":
        return SlotCost(*(getattr(self, field.name) * times for field in fields(SlotCost)))


@dataclass(frozen=True)
class Timer:
    """Prices work on a machine; `folded` are the axes of both views of the mesh."""

    machine: Machine
    folded: Refinement
    gpus_per_node: int
    profile: Profile
    zero: Zero

    def group(self, purpose: str) -> Group:
        """The devices that a collective runs over."""
        flags = PURPOSES[purpose].flags
        if purpose == "fsdp" and self.zero == "parameters":
            flags = SHARD_FLAGS
        return self._along(*flags)

    def parts(self, flag: str) -> int:
        """Devices along a flag."""
        return self._along(flag).size

    def _along(self, *flags: str) -> Group:
        axes = tuple(axis for flag in flags for axis in self.folded.flags[flag])
        return axes_group(self.folded.sizes, axes, self.gpus_per_node)

    def cost(self, work: PhaseWork) -> SlotCost:
        """Seconds of a piece of work alone on the device."""
        products = sum(map(self.machine.product_seconds, work.products))
        products += sum(map(self.machine.fused_seconds, work.fused))
        found = SlotCost(products, self.machine.pass_seconds(work.stream, work.kernels))
        behind = products
        for purpose, (hides, spent, _) in PURPOSES.items():
            if hides is None or spent is None:
                continue
            seconds = self.collectives(tuple(one for one in work.collectives if one.purpose == purpose))
            hidden = min(getattr(self.profile.overlap, hides) * seconds, behind)
            behind -= hidden
            found += SlotCost(**{spent: seconds - hidden})
        return found

    def collectives(self, found: tuple[CollectiveWork, ...]) -> float:
        """Seconds of collectives one after the other, none hidden."""
        return sum(
            one.count * self.machine.collective_seconds(one.kind, one.size, self.group(one.purpose)) for one in found
        )

    def message(self, stream: float) -> float:
        """Seconds of a microbatch's stream of so many bytes from one stage to the next: each device sends its part.

        Where the stream is copied over `tensor`, a part is sent all the same and gathered after it (2104.04473, 4.1).
        """
        parts = self.parts("tensor")
        if self.parts("pipe") == 1:
            return 0.0
        inside = self._along("pipe")
        seconds = self.machine.message_seconds(stream / parts, inside_node=inside.local == inside.size)
        if self.profile.sequence_sharded or parts == 1:
            return seconds
        return seconds + self.machine.collective_seconds("all_gather", stream, self.group("tensor"))

"""What a step does once, beside the slots of its schedule, and what runs in a slot."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.operations import CollectiveWork, PhaseWork, SlotWork
from jaxtron.models.work.shapes import Shapes
from jaxtron.pipeline.schedules.figures import Slot
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.config import Zero

# Of Adam and clipping, for each parameter of a device's share: gradient for the norm 4; gradient, weight and moments
# read 16; weight and moments written 12; 2 for the working weight. SGD has one moment.
OPTIMIZER_BYTES = {"adamw": 34, "sgd": 26}


@dataclass(frozen=True)
class Once:
    """What a stage does once a step: parameters of a device, and bytes of its collectives."""

    parameters: float
    """Of the device's share, which the optimizer updates."""
    reduced: tuple[CollectiveWork, ...] = field(default=())
    gathered: tuple[CollectiveWork, ...] = field(default=())
    tables: tuple[CollectiveWork, ...] = field(default=())
    """Of the embedding and the head over `pipe`: gradients summed, and where the stages share their state weights
    gathered."""

    def __add__(self, other: "Once") -> "Once":
        return Once(
            self.parameters + other.parameters,
            self.reduced + other.reduced,
            self.gathered + other.gathered,
            self.tables + other.tables,
        )


def once(config: Configuration, shapes: Shapes, work: ModelWork, layers: Sequence[int]) -> Once:
    """The step's end on a stage with so many layers of each stack (or kind): gradients in float32, weights in the
    step's precision."""
    zero, sizes = config.sharding.zero, shapes.sizes
    # what sums gradients at the end of a step shares the state too
    data = sizes["data"] * shapes.parts
    stacked = sum(count * stack.parameters for count, stack in zip(layers, work.stacks, strict=True))
    shares = sizes["pipe"] if shapes.profile.shares_outer else 1
    local = (stacked + work.outer_parameters / shares) / shapes.gathered
    tables = ()
    experts = _experts_once(config, shapes, work, layers)
    rest = work.outer_parameters / shapes.gathered
    if not rest:
        tables = ()
    elif shares > 1:
        tables = (
            CollectiveWork("reduce_scatter", 4 * rest, "pipe"),
            CollectiveWork("all_gather", shapes.width * rest, "pipe"),
        )
    elif sizes["pipe"] > 1:
        tables = (CollectiveWork("all_reduce", 4 * rest / (data if zero == "optimizer" else 1), "pipe"),)
    share = zero if data > 1 else "parameters"
    return experts + _shared("data", local, data, share, shapes.width) + Once(0, tables=tables)


def _experts_once(config: Configuration, shapes: Shapes, work: ModelWork, layers: Sequence[int]) -> Once:
    """Of experts, which their copies share."""
    zero, copies = config.sharding.zero, shapes.sizes["expert_data"]
    held = sum(count * stack.expert_parameters for count, stack in zip(layers, work.stacks, strict=True))
    # those gathered at use are reduced there
    share = zero if copies > 1 and shapes.expert_gathered == 1 else "parameters"
    return _shared("expert_data", held / shapes.expert_gathered, copies, share, shapes.width)


def _shared(purpose: str, local: float, parts: int, zero: Zero, width: int) -> Once:
    """Parameters of a device whose gradients so many devices add up, unless they did where they are used."""
    if zero == "parameters" or not local:
        return Once(local)
    if zero == "none":
        return Once(local, (CollectiveWork("all_reduce", 4 * local, purpose),))
    return Once(
        local / parts,
        (CollectiveWork("reduce_scatter", 4 * local, purpose),),
        (CollectiveWork("all_gather", width * local, purpose),),
    )


def slot_work(slots: SlotWork, slot: Slot, *, split: bool) -> PhaseWork:
    """What a slot of a schedule runs; a backward that is not split has the weight gradient too."""
    if slot == "backward" and not split:
        return slots.backward + slots.weight
    return getattr(slots, slot)

"""What is left of a piece of work where weights are frozen, and what low-rank adapters (LoRA) add to it."""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtron.models.work.operations import NOTHING, CollectiveWork, PhaseWork, Product, SlotWork
from jaxtron.models.work.shapes import MASK_BYTES, Shapes, gather, over_tensor, scatter

# bytes of a number that a product adds to a float32 sum: what makes a weight's gradient
SUMMED = 8


@dataclass(frozen=True)
class AdapterShapes:
    """A pair of matrices beside a weight, or several pairs that read the same; widths are those of a device."""

    inputs: float
    outputs: float
    rank: int
    split: Literal["inputs", "outputs"] | None
    """What of the weight `tensor` splits: the other side's matrix is whole on every device."""
    pairs: int = 1
    dropout: bool = False


def adapter(shapes: Shapes, layer: AdapterShapes, *, again: bool = False) -> SlotWork:
    """Products through the rank, and the sum with what the weight makes; `again`: also in the backward.

    Between the two what travels over `tensor` is as narrow as the rank: a device applies the whole matrix to its own
    positions.
    """
    inputs, outputs, rank, pairs, width = layer.inputs, layer.outputs, layer.rank, layer.pairs, shapes.width
    before = shapes.tokens if layer.split == "inputs" else shapes.own_tokens
    after = shapes.tokens if layer.split == "outputs" else shapes.own_tokens
    narrow = shapes.tokens * rank * pairs * width
    there = {"inputs": scatter(shapes, narrow), "outputs": gather(shapes, narrow), None: ()}[layer.split]
    back = {"inputs": gather(shapes, narrow), "outputs": scatter(shapes, narrow), None: ()}[layer.split]
    dropped = pairs * before * inputs * (2 * width + MASK_BYTES) if layer.dropout else 0.0
    forward = PhaseWork(
        (
            Product(before, rank * pairs, inputs, width=width, output_width=width),
            Product(after, outputs, rank, pairs, width, output_width=width),
        ),
        stream=3 * pairs * after * outputs * width + dropped,
        kernels=1 + layer.dropout,
        collectives=there,
    )
    backward = PhaseWork(
        (
            Product(after, rank, outputs, pairs, width, output_width=width),
            Product(before, inputs, rank * pairs, width=width, output_width=width),
        ),
        stream=3 * before * inputs * width + dropped,
        kernels=1 + layer.dropout,
        collectives=back,
    )
    # of what every device has, the gradient of its own positions
    copied = (inputs * rank * (layer.split != "inputs") + rank * outputs * (layer.split != "outputs")) * pairs
    weight = PhaseWork(
        (
            Product(inputs, rank * pairs, before, width=width, output_width=SUMMED),
            Product(rank, outputs, after, pairs, width, output_width=SUMMED),
        ),
        collectives=over_tensor(shapes, "all_reduce", copied * width) if copied else (),
    )
    return SlotWork(forward, backward + forward if again else backward, weight)


def partly_trained(work: SlotWork, share: float) -> SlotWork:
    """The same where this part of the numbers that make its weight gradients is trained."""
    return replace(work, weight=_part(work.weight, share))


def head_partly_trained(work: SlotWork, share: float) -> SlotWork:
    """The same of a head, whose gradients are formed in its forward."""
    forward = work.forward
    products = tuple(
        one if one.output_width != SUMMED else replace(one, count=share * one.count)
        for one in forward.products
        if share or one.output_width != SUMMED
    )
    return replace(work, forward=replace(forward, products=products, collectives=_reduced(forward.collectives, share)))


def _part(phase: PhaseWork, share: float) -> PhaseWork:
    if share in (0.0, 1.0):
        return phase if share else NOTHING
    return replace(
        phase,
        products=tuple(replace(one, count=share * one.count) for one in phase.products),
        masked_flops=share * phase.masked_flops,
        stream=share * phase.stream,
        collectives=tuple(replace(one, count=share * one.count) for one in phase.collectives),
    )


def _reduced(collectives: tuple[CollectiveWork, ...], share: float) -> tuple[CollectiveWork, ...]:
    """With as much of the gradients' reductions at use."""

    def is_reduction(one: CollectiveWork) -> bool:
        return one.kind == "reduce_scatter" and one.purpose in ("fsdp", "expert_fsdp")

    return tuple(
        replace(one, count=share * one.count) if is_reduction(one) else one
        for one in collectives
        if share or not is_reduction(one)
    )

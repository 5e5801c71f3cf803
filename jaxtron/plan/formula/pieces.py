"""The pieces of a model in the slots of a schedule: a period of its layers, its ends, and what a step does once."""

from dataclasses import dataclass, field

from jaxtron.models.decoder.cost import embedding_parameters, period_parameters, table_parameters
from jaxtron.models.decoder.kinds import KINDS, LayerKind
from jaxtron.models.decoder.pattern import Branch
from jaxtron.pipeline.schedules.figures import Slot
from jaxtron.plan.formula.layer_work import LAYER_WORK
from jaxtron.plan.formula.workload import (
    CollectiveWork,
    PhaseWork,
    RegionWork,
    Shapes,
    SlotWork,
    dropout_bytes,
    gather,
    gathered_weights,
    over_tensor,
    scatter,
)
from jaxtron.plan.machine import Product
from jaxtron.run.configuration import Configuration

# Of Adam and clipping, for each parameter of a device's share: gradient for the norm 4; gradient, weight and moments
# read 16; weight and moments written 12; 2 for the working weight. SGD has one moment.
OPTIMIZER_BYTES = {"adamw": 34, "sgd": 26}


def period(shapes: Shapes) -> SlotWork:
    """One period of the model's pattern, recomputation in the backward."""
    recomputed = shapes.model.recomputed
    found = SlotWork()
    for branch in shapes.model.layout.period:
        found += _branch(shapes, branch)
    if "layer" in recomputed:
        found += SlotWork(backward=found.forward)
    return found + gathered_weights(shapes, period_parameters(shapes.model, shapes.tensor))


def embedding(shapes: Shapes) -> SlotWork:
    """Look-up in the vocabulary-sharded table, positions and dropout; the gradient is added row by row in float32."""
    model, width = shapes.model, shapes.width
    size = shapes.residual_bytes
    passes = 2 + model.embedding_norm + (model.position == "learned")
    drop = dropout_bytes(shapes) + passes * 2 * shapes.own_tokens * model.hidden_size * width
    back = shapes.tokens * model.hidden_size * (width + 8)
    reduced = scatter(shapes, size)
    returned = gather(shapes, size)
    table = gathered_weights(shapes, embedding_parameters(shapes.model, shapes.length, shapes.tensor))
    return table + SlotWork(
        forward=PhaseWork(stream=2 * size + drop, kernels=3, collectives=reduced),
        backward=PhaseWork(stream=back + drop, kernels=3, collectives=returned),
    )


def head(shapes: Shapes) -> SlotWork:
    """Final norm, head and loss with their gradients, which are formed at once in the last stage's forward."""
    n, h, v = shapes.tokens, shapes.model.hidden_size, shapes.vocab
    size = shapes.residual_bytes
    stream = n * v * shapes.profile.logit_bytes + 8 * shapes.own_tokens * h * shapes.width
    products = (
        Product(n, v, h, width=shapes.width, output_width=0),
        Product(n, h, v, width=shapes.width, output_width=shapes.width),
        Product(v, h, n, width=shapes.width, output_width=8),
    )
    sums = over_tensor(shapes, "all_reduce", 12.0 * n)
    moved = (*gather(shapes, size), *scatter(shapes, size), *sums)
    weights = gathered_weights(shapes, h * v)
    work = PhaseWork(products, stream=stream, kernels=8, collectives=moved)
    return SlotWork(forward=work + weights.forward + weights.weight)


def _branch(shapes: Shapes, branch: Branch) -> SlotWork:
    """One residual layer: a norm, what reads it, and the residual sum of each."""
    model, width = shapes.model, shapes.width
    stream = shapes.own_tokens * model.hidden_size * width
    gathered = gather(shapes, shapes.residual_bytes)
    again = gather(shapes, shapes.residual_bytes, "regather")
    # norm: input read, output written; backward: input, its gradient and the residual's read, their sum written
    found = SlotWork(
        forward=PhaseWork(stream=2 * stream, kernels=1, collectives=gathered),
        backward=PhaseWork(stream=4 * stream, kernels=2, collectives=scatter(shapes, shapes.residual_bytes)),
        weight=PhaseWork(collectives=again),
    )
    for symbol in branch:
        found += _recomputed(shapes, KINDS[symbol], LAYER_WORK[symbol].slots(shapes)) + _residual(shapes)
    return found


def _recomputed(shapes: Shapes, kind: LayerKind, regions: RegionWork) -> SlotWork:
    """A branch with the forward of what `model.recompute` names of it in its backward too."""
    found = sum(regions.values(), start=SlotWork())
    if kind.module in shapes.model.recomputed:
        gathered = PhaseWork(collectives=gather(shapes, shapes.residual_bytes))
        return found + SlotWork(backward=found.forward + gathered)
    for name in kind.parts:
        if name in shapes.model.recomputed:
            found += SlotWork(backward=regions[name].forward)
    return found


def _residual(shapes: Shapes) -> SlotWork:
    """What a branch ends with: its partial sums reduced, dropout, and the sum with the residual stream."""
    stream = shapes.own_tokens * shapes.model.hidden_size * shapes.width
    drop = dropout_bytes(shapes)
    return SlotWork(
        forward=PhaseWork(stream=3 * stream + drop, kernels=1, collectives=scatter(shapes, shapes.residual_bytes)),
        backward=PhaseWork(
            stream=(2 * stream if drop else 0) + drop,
            kernels=1,
            collectives=gather(shapes, shapes.residual_bytes),
        ),
    )


@dataclass(frozen=True)
class Once:
    """What a stage does once a step: parameters of a device, and bytes of its collectives."""

    parameters: float
    """Of the device's share, which the optimizer updates."""
    reduced: tuple[CollectiveWork, ...] = field(default=())
    gathered: tuple[CollectiveWork, ...] = field(default=())
    tables: tuple[CollectiveWork, ...] = field(default=())
    """Gradients of the embedding and the head, which all stages hold, summed over `pipe`."""


def once(config: Configuration, shapes: Shapes, periods: int) -> Once:
    """The step's end on a stage with so many periods: gradients in float32, weights in the step's precision."""
    zero, sizes = config.sharding.zero, shapes.sizes
    # what sums gradients at the end of a step shares the state too
    data = sizes["data"] * shapes.parts
    tables_of_device = table_parameters(shapes.model, shapes.length, shapes.tensor)
    local = (periods * period_parameters(shapes.model, shapes.tensor) + tables_of_device) / shapes.gathered
    tables = ()
    if sizes["pipe"] > 1:
        rest = tables_of_device / shapes.gathered / (data if zero == "optimizer" else 1)
        tables = (CollectiveWork("all_reduce", 4 * rest, "pipe"),)
    if zero == "parameters" or data == 1:
        return Once(local, tables=tables)
    if zero == "none":
        return Once(local, (CollectiveWork("all_reduce", 4 * local, "data"),), tables=tables)
    # what is gathered again at use stays in float32 until then
    width = shapes.width if sizes["fsdp"] == 1 else 4
    return Once(
        local / data,
        (CollectiveWork("reduce_scatter", 4 * local, "data"),),
        (CollectiveWork("all_gather", width * local, "data"),),
        tables=tables,
    )


def slot_work(slots: SlotWork, slot: Slot, *, split: bool) -> PhaseWork:
    """What a slot of a schedule runs; a backward that is not split has the weight gradient too."""
    if slot == "backward" and not split:
        return slots.backward + slots.weight
    return getattr(slots, slot)

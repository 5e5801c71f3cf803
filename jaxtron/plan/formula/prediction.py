"""How long a step takes, from the operations of its slots and the timeline of its schedule."""

import functools
import itertools
import math
from dataclasses import dataclass, fields, replace

from jaxtron.gpus import gpu_named
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.operations import CollectiveWork
from jaxtron.models.work.profile import JAXTRON, Profile
from jaxtron.pipeline.partition import StagePlan
from jaxtron.pipeline.schedules.figures import Slot, Walk, times, walk
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.plan.formula import pieces
from jaxtron.plan.formula.pieces import OPTIMIZER_BYTES, Once
from jaxtron.plan.formula.timer import SlotCost, Timer
from jaxtron.plan.formula.trained import model_flops_per_token, trained_work
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.machine import Machine
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import FLAGS

SLOTS: tuple[Slot, ...] = ("forward", "backward", "weight")


@dataclass(frozen=True)
class Breakdown(SlotCost):
    """Seconds of a step on the stage that ends last: of its slots, and what comes beside them."""

    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """A step: seconds, tokens/s of all GPUs, FLOPs of one GPU (`model`: the papers' formula; `hardware`: with what
    is computed again), and what part of the GPU's peak that is; seconds of a slot by virtual stage."""

    step_seconds: float
    tokens_per_second: float
    model_flops: float
    hardware_flops: float
    mfu: float
    hfu: float
    breakdown: Breakdown
    slot_seconds: dict[Slot, list[float]]

    def seconds_for(self, tokens: float) -> float:
        """Seconds of training on so many tokens."""
        return tokens / self.tokens_per_second


def predict(
    config: Configuration,
    sizes: dict[str, int],
    machine: Machine,
    *,
    gpus_per_node: int = 8,
    profile: Profile = JAXTRON,
) -> Prediction:
    """The step of a configuration on a mesh of these sizes by axis; docs/prediction.md has the equations.

    Raises `UserError` where the configuration does not fit the mesh.
    """
    config = config.resolved()
    config.check_mesh(sizes)
    shapes = shapes_of(config, sizes, profile, gpu_named(machine.gpu).device_kind)
    folded = config.mesh.refined(sizes)
    timer = Timer(machine, folded, gpus_per_node, profile, config.sharding.zero)
    work = trained_work(config, sizes, shapes, work_of(config, shapes))
    table, walked = _walk(config, sizes["pipe"])
    plan = config.stage_plan(sizes["pipe"])
    costs, flops = _slot_costs(work, table, plan, timer)
    durations: dict[Slot, list[float]] = {slot: [cost.total for cost in costs[slot]] for slot in costs}
    saved = _saved(table, costs, profile)
    _, ended = times(
        walked, durations, latency=_hidden_messages(table, profile) * timer.message(work.stream), saved=saved
    )
    ends, spared = [0.0] * table.num_stages, [0.0] * table.num_stages
    for stage, end in zip(walked.stages, ended, strict=True):
        ends[stage] = end
    for place in walked.joined:
        spared[walked.stages[place]] += saved[walked.virtuals[place], walked.virtuals[place + 1]]
    stages = []
    for stage, end in enumerate(ends):
        layers = [sum(part.chunk_lengths[stage]) for _, part in plan.alike]
        found = _stage(config, table, costs, stage, end, pieces.once(config, shapes, work, layers))
        stages.append(replace(found, work=found.work + SlotCost(expert=-spared[stage])))
    breakdown = _breakdown(stages, timer, config.optimizer.name)
    return _prediction(config, sizes, machine, breakdown, flops, durations)


def _prediction(
    config: Configuration,
    sizes: dict[str, int],
    machine: Machine,
    breakdown: Breakdown,
    flops: float,
    durations: dict[Slot, list[float]],
) -> Prediction:
    num_gpus = math.prod(sizes[axis] for axis in FLAGS)
    tokens = config.train.global_batch * config.data.sequence_length
    seconds, peak = breakdown.total, machine.datasheet.peak_flops
    model_flops = model_flops_per_token(config) * tokens / num_gpus
    hardware_flops = flops * config.train.microbatches / sizes["pipe"]
    return Prediction(
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        model_flops=model_flops,
        hardware_flops=hardware_flops,
        mfu=model_flops / seconds / peak,
        hfu=hardware_flops / seconds / peak,
        breakdown=breakdown,
        slot_seconds=durations,
    )


def _walk(config: Configuration, num_stages: int) -> tuple[Schedule, Walk]:
    table, name = config.schedule(num_stages), config.pipeline.schedule
    if num_stages == 1 or name.endswith(".csv"):
        return table, walk(table)
    return table, _known_walk(name, num_stages, table.num_microbatches, table.num_chunks, table.overlap)


@functools.lru_cache(maxsize=16)
def _known_walk(name: str, num_stages: int, num_microbatches: int, num_chunks: int, overlap: bool) -> Walk:
    """A search asks for the same schedule again and again; hashing its table would cost as much as the walk."""
    return walk(replace(make_schedule(name, num_stages, num_microbatches, num_chunks), overlap=overlap))


def _hidden_messages(table: Schedule, profile: Profile) -> float:
    """The part of messages between stages that is hidden: none where they wait for a forward and a backward at once."""
    return 0.0 if table.overlap else profile.overlap.pipe


def _saved(table: Schedule, costs: dict[Slot, list[SlotCost]], profile: Profile) -> dict[tuple[int, int], float]:
    """Seconds of exchange that a forward and a backward hide behind each other's products, by virtual stages."""
    if not table.overlap:
        return {}
    alone, together = 1 - profile.overlap.expert, 1 - profile.overlap.pairs
    part = max(0.0, 1 - together / alone) if alone else 0.0
    chunks = range(table.num_chunks)
    found = {}
    for stage, ahead, back in itertools.product(range(table.num_stages), chunks, chunks):
        first, second = table.virtual(stage, ahead), table.virtual(stage, back)
        forward, backward = costs["forward"][first], costs["backward"][second]
        hidden = min(part * forward.expert, backward.products) + min(part * backward.expert, forward.products)
        found[first, second] = hidden
    return found


def _slot_costs(
    work: ModelWork, table: Schedule, plan: StagePlan, timer: Timer
) -> tuple[dict[Slot, list[SlotCost]], float]:
    """The cost of each slot by virtual stage, and the FLOPs of a microbatch on a device of each stage, added up."""
    last = table.num_virtual - 1
    message = SlotCost(pipe=(1 - _hidden_messages(table, timer.profile)) * timer.message(work.stream))
    costs: dict[Slot, list[SlotCost]] = {}
    flops = 0.0
    for slot in SLOTS if table.split else SLOTS[:2]:
        costs[slot] = []
        head = pieces.slot_work(work.head, slot, split=table.split)
        ending = timer.cost(head)
        kinds = iter(work.stacks)
        for partition in plan.partitions:
            own = [(next(kinds), part) for part in partition.alike]
            layers = [pieces.slot_work(kind.layer, slot, split=table.split) for kind, _ in own]
            enter = pieces.slot_work(own[0][0].enter, slot, split=table.split)
            each, first = [timer.cost(layer) for layer in layers], timer.cost(enter)
            for number in range(len(partition.lengths)):
                virtual = len(costs[slot])
                ends = (first,) * (number == 0) + (ending,) * (virtual == last)
                arrives = slot == "forward" and virtual > 0 or slot == "backward" and virtual < last
                run = (cost * part.lengths[number] for cost, (_, part) in zip(each, own, strict=True))
                costs[slot].append(sum((*ends, *(message,) * arrives), start=sum(run, start=SlotCost())))
            flops += sum(layer.flops * part.num_layers for layer, (_, part) in zip(layers, own, strict=True))
            flops += enter.flops
        flops += head.flops
    return costs, flops


@dataclass(frozen=True)
class StageStep:
    """One stage's step: all its slots, one backward and one forward, when it is through, and what it does once."""

    work: SlotCost
    forward: SlotCost
    backward: SlotCost
    end: float
    once: Once


def _stage(
    config: Configuration,
    table: Schedule,
    costs: dict[Slot, list[SlotCost]],
    stage: int,
    end: float,
    once: Once,
) -> StageStep:
    mine = [table.virtual(stage, chunk) for chunk in range(table.num_chunks)]
    slots = {slot: sum((costs[slot][virtual] for virtual in mine), start=SlotCost()) for slot in costs}
    return StageStep(
        work=sum(slots.values(), start=SlotCost()) * config.train.microbatches,
        forward=slots["forward"],
        backward=slots["backward"],
        end=end,
        once=once,
    )


def _breakdown(stages: list[StageStep], timer: Timer, optimizer: str) -> Breakdown:
    """Of the stage whose gradients are reduced last: all wait for their norm, and then for the slowest update."""
    overlap = timer.profile.overlap.data

    def exposed(found: tuple[CollectiveWork, ...], beside: SlotCost) -> float:
        seconds = timer.collectives(found)
        return seconds - min(overlap * seconds, beside.products)

    reduced = [exposed(stage.once.reduced, stage.backward) for stage in stages]
    done, latest = max((stage.end + reduced[number], number) for number, stage in enumerate(stages))
    update = max(stage.once.parameters for stage in stages) * OPTIMIZER_BYTES[optimizer]
    work = stages[latest].work
    spent = work + SlotCost(pipe=timer.collectives(stages[0].once.tables))
    return Breakdown(
        **{field.name: getattr(spent, field.name) for field in fields(spent)},
        bubble=max(0.0, stages[latest].end - work.total),
        data=done - stages[latest].end + max(exposed(stage.once.gathered, stage.forward) for stage in stages),
        optimizer=timer.machine.pass_seconds(update),
    )

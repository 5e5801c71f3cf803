"""A step's communication weighed: which links it crosses, how long it takes, and what hides behind products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtron.models.work.operations import CollectiveKind
from jaxtron.models.work.profile import Overlap
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.tick_loops import reached
from jaxtron.plan.compiled.census import Collective, part_of
from jaxtron.plan.compiled.flops import kind_shares
from jaxtron.plan.compiled.links import Link, link
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.machine import Group, Machine, axes_group
from jaxtron.sharding.folding import BATCH_FLAGS, SHARD_FLAGS
from jaxtron.sharding.mesh import Folding

_KINDS: dict[str, CollectiveKind] = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all",
}


class CommunicationKey(NamedTuple):
    """What communications of one row have in common. `loops` are trip counts, outermost first; None is unknown."""

    kind: str
    axes: tuple[str, ...]
    loops: tuple[int | None, ...]
    conditional: bool


@dataclass(frozen=True)
class CommunicationRow:
    """Communications that differ only in their arrays; bytes and seconds are those of one GPU and step.

    `payload` counts whole arrays, `sent` what a GPU sends over a ring. `hidden` of the `seconds` the compiler scheduled
    beside products that take as long. `each` is the payload of one round of the innermost loop.
    """

    key: CommunicationKey
    link: Link | None
    operations: int
    arrays: int
    executions: int
    payload: int
    sent: float
    each: int
    asynchronous: int
    seconds: float
    hidden: float


def communication_rows(rehearsal: Rehearsal, machine: Machine) -> list[CommunicationRow]:
    """The census by kind, axes and loops, what takes longest first; without further rounds of experts."""
    groups: dict[CommunicationKey, list[Collective]] = {}
    for entry in rehearsal.collectives:
        if is_further(entry):
            continue
        groups.setdefault(CommunicationKey(entry.kind, entry.axes, entry.loops, entry.conditional), []).append(entry)
    weigh, times = _weigher(rehearsal, machine), runs(rehearsal)
    found = [_row(key, entries, rehearsal, weigh, times) for key, entries in groups.items()]
    return sorted(found, key=lambda row: (-row.seconds, row.key))


def is_further(entry: Collective) -> bool:
    """Whether it runs only where choices of experts are so uneven that one round does not take them."""
    return 0 in entry.loops


def compiled_overlap(rehearsal: Rehearsal, machine: Machine) -> Overlap:
    """The part of each kind of communication that the compiled schedule hides, for the model of time."""
    weigh, folding = _weigher(rehearsal, machine), rehearsal.session.rules.folding
    is_exchange = exchange_of(folding)
    exchanged = [entry for entry in rehearsal.collectives if is_exchange(entry)]
    entries = [(entry, {*folding.named(entry.names)}) for entry in rehearsal.collectives if not is_exchange(entry)]
    batch, shared = ({*folding.axes(*flags)} for flags in (BATCH_FLAGS, SHARD_FLAGS))
    # parts of a sequence share the state as the batch does: what travels in attention does so in a loop over layers
    once = [entry for entry, axes in entries if not entry.loops and axes & shared]
    at_use = [entry for entry, axes in entries if entry.loops and axes & batch]
    tensor = [entry for entry, _ in entries if entry.axes == ("tensor",)]
    split = [entry for entry, _ in entries if entry.loops and entry.names == ("context",)]
    pipe = [entry for entry, _ in entries if entry.kind == "collective_permute" and entry.axes == ("pipe",)]

    def part(entries: Sequence[Collective]) -> float:
        times = [weigh(entry) for entry in entries]
        total = sum(seconds for seconds, _ in times)
        return sum(hidden for _, hidden in times) / total if total else 0.0

    return Overlap(
        tensor=part(tensor),
        regather=part(tensor),
        fsdp=part(at_use),
        data=part(once),
        pipe=part(pipe),
        context=part(split),
        expert=part([entry for entry in exchanged if not entry.paired]),
        pairs=part([entry for entry in exchanged if entry.paired]),
    )


def exchange_of(folding: Folding) -> Callable[[Collective], bool]:
    """Tells what brings tokens to their experts and back: all-to-alls along mesh.expert, and in layers what puts rows
    together along mesh.expert_tensor and adds them up, where these are not the devices of mesh.tensor."""
    expert, width, tensor = ({*folding.axes(flag)} for flag in ("expert", "expert_tensor", "tensor"))

    def belongs(entry: Collective) -> bool:
        axes = {*folding.named(entry.names)}
        if entry.group_size <= 1 or entry.kind == "all_to_all":
            return entry.group_size > 1 and axes == expert
        return bool(entry.loops) and axes == width != tensor and entry.kind in ("all_gather", "reduce_scatter")

    return belongs


def runs(rehearsal: Rehearsal) -> Callable[[Collective], float]:
    """How often a communication runs on a stage in a step.

    What a schedule's ticks choose runs where the stage has such work, not at every tick of the loop. Of a schedule that
    overlaps, the stage is one with the most pairs. What a kind of layers has runs as often as a chunk has such layers,
    on an average.
    """
    config, num_stages = rehearsal.session.config, rehearsal.session.sizes["pipe"]
    stages, table = config.stage_plan(num_stages), config.schedule(num_stages)
    shares = {"": 1.0} | kind_shares(stages)
    if stages.num_virtual == 1:
        return lambda entry: entry.executions * shares[entry.layers]
    lowered = lower(table, stages.stack_chunks)
    # of several stacks, which have as many chunks each, a tick chooses one
    each, pairs = table.num_microbatches * stages.stack_chunks[0], int(lowered.paired.sum(0).max())

    ticks = {kind: max(1, reached(lowered, kind)) for kind in ("forward", "backward", "paired")}

    def part(entry: Collective) -> float:
        if not entry.conditional:
            return 1.0
        if entry.paired:
            return pairs / ticks["paired"]
        return (each - pairs) / ticks["backward" if entry.backward else "forward"]

    return lambda entry: entry.executions * shares[entry.layers] * part(entry)


def collective_timer(rehearsal: Rehearsal, machine: Machine) -> Callable[[Collective], float]:
    """Seconds that one execution of a communication takes by itself."""
    folding = rehearsal.session.rules.folding
    sizes = folding.mesh.shape

    def seconds(entry: Collective) -> float:
        if entry.group_size <= 1:
            return 0.0
        neighbours = {name: count for name, count in map(part_of, entry.axes) if count}
        axes = folding.named(entry.names)
        known = set(axes) <= set(sizes)
        group = (
            axes_group({**sizes, **neighbours}, axes, rehearsal.gpus_per_node) if known else Group(entry.group_size, 1)
        )
        if entry.kind in _KINDS:
            return machine.collective_seconds(_KINDS[entry.kind], entry.bytes, group)
        return machine.message_seconds(entry.sent_bytes, inside_node=group.local == group.size)

    return seconds


Weigher = Callable[[Collective], tuple[float, float]]


def _weigher(rehearsal: Rehearsal, machine: Machine) -> Weigher:
    """Seconds a step of one communication, and how many of them are hidden."""
    timer, times = collective_timer(rehearsal, machine), runs(rehearsal)
    speed = machine.datasheet.peak_flops * machine.product_fraction

    def weigh(entry: Collective) -> tuple[float, float]:
        seconds = timer(entry)
        hidden = min(seconds, entry.beside / speed) if entry.asynchronous else 0.0
        return seconds * times(entry), hidden * times(entry)

    return weigh


def _row(
    key: CommunicationKey,
    entries: Sequence[Collective],
    rehearsal: Rehearsal,
    weigh: Weigher,
    times: Callable[[Collective], float],
) -> CommunicationRow:
    weighed, folding = [weigh(entry) for entry in entries], rehearsal.session.rules.folding
    return CommunicationRow(
        key=key,
        link=link(folding.mesh.shape, folding.named(key.axes), rehearsal.gpus_per_node),
        operations=len(entries),
        arrays=sum(entry.operands for entry in entries),
        executions=round(sum(map(times, entries))),
        payload=round(sum(entry.bytes * times(entry) for entry in entries)),
        sent=sum(entry.sent_bytes * times(entry) for entry in entries),
        each=sum(entry.bytes for entry in entries),
        asynchronous=sum(entry.asynchronous for entry in entries),
        seconds=sum(seconds for seconds, _ in weighed),
        hidden=sum(hidden for _, hidden in weighed),
    )

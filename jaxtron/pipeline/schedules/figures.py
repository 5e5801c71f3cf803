"""What a schedule costs, from its table alone: microbatches in flight, messages, ticks, and time without a device.

Time is in units of one microbatch's forward through a whole stage; a backward takes two, half of it the input gradient.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work

Slot = Literal["forward", "backward", "weight"]


class Span(NamedTuple):
    """A slot in the timeline of its stage."""

    slot: Slot
    work: Work
    start: float
    end: float


class Boundary(NamedTuple):
    """A link between neighbouring stages in one direction, and what travels: activations or their gradients."""

    source: int
    target: int
    slot: Slot


@dataclass(frozen=True)
class StageFigures:
    """One stage. Chunks count singly: a microbatch in flight in two chunks is two.

    `warm_up` are the forwards before the one that comes right before the first backward; `in_flight` the most forwards
    without their backward, `deferred` the most backwards without their weight gradient, `held` the most of both.
    """

    warm_up: int
    in_flight: int
    deferred: int
    held: int
    work: float


@dataclass(frozen=True)
class Figures:
    """A whole schedule. Bubbles are idle time over the work of the busiest stage.

    `ideal_ticks` is the fewest ticks that the slots of the busiest stage could take in such entries as the table has.
    `bubble` is that of the timeline, where a stage waits for its inputs only; `lockstep_bubble` where every tick lasts
    as long as its longest entry; `tick_bubble` where all ticks are equal.
    """

    stages: tuple[StageFigures, ...]
    num_ticks: int
    ideal_ticks: int
    makespan: float
    bubble: float
    lockstep_bubble: float
    messages: dict[Boundary, int]

    @property
    def tick_bubble(self) -> float:
        """Ticks over the ideal, less one."""
        return self.num_ticks / self.ideal_ticks - 1

    @property
    def num_messages(self) -> int:
        """Messages between stages of a step."""
        return sum(self.messages.values())


def figures(schedule: Schedule, *, latency: float = 0.0) -> Figures:
    """All figures of a valid schedule; a message arrives `latency` after its slot's end."""
    counts = [flight(schedule, stage) for stage in range(schedule.num_stages)]
    costs = slot_costs(schedule)
    columns = list(zip(*schedule.table, strict=True))
    work = [sum(_cost(entry, costs) for entry in column) for column in columns]
    makespan = max(spans[-1].end for spans in timeline(schedule, latency=latency) if spans)
    lockstep = sum(max(_cost(entry, costs) for entry in row) for row in schedule.table)
    stages = tuple(
        StageFigures(
            warm_up=_warm_up(column),
            in_flight=max(count.in_flight for count in counted),
            deferred=max(count.deferred for count in counted),
            held=max(count.held for count in counted),
            work=stage_work,
        )
        for column, counted, stage_work in zip(columns, counts, work, strict=True)
    )
    return Figures(
        stages=stages,
        num_ticks=schedule.num_ticks,
        ideal_ticks=max(_ideal_ticks(column) for column in columns),
        makespan=makespan,
        bubble=makespan / max(work) - 1,
        lockstep_bubble=lockstep / max(work) - 1,
        messages=messages(schedule),
    )


class Flight(NamedTuple):
    """The most that a stage holds at a time within one tick: microbatches, or bytes of them."""

    in_flight: int
    deferred: int
    held: int


def flight(schedule: Schedule, stage: int, sizes: Sequence[int] | None = None) -> list[Flight]:
    """What the stage holds at each tick, counted after each of its slots: a forward adds before a backward takes.

    A microbatch counts as `sizes` has it for the chunk that it is in (none: one).
    """

    def size(work: Work | None) -> int:
        if work is None:
            return 0
        return 1 if sizes is None else sizes[work.chunk]

    in_flight = deferred = 0
    found = []
    for row in schedule.table:
        entry = row[stage]
        in_flight += size(entry.forward)
        most_in_flight, held = in_flight, in_flight + deferred
        in_flight -= size(entry.backward)
        deferred += size(entry.backward) if schedule.split else 0
        found.append(Flight(most_in_flight, deferred, max(held, in_flight + deferred)))
        deferred -= size(entry.weight)
    return found


def messages(schedule: Schedule) -> dict[Boundary, int]:
    """How many messages each boundary needs, by direction and kind: one a microbatch where neighbours in depth part."""
    found: Counter[Boundary] = Counter()
    for virtual in range(schedule.num_virtual - 1):
        below, above = schedule.place(virtual)[0], schedule.place(virtual + 1)[0]
        if below != above:
            found[Boundary(below, above, "forward")] += schedule.num_microbatches
            found[Boundary(above, below, "backward")] += schedule.num_microbatches
    return dict(found)


def slot_costs(schedule: Schedule) -> dict[Slot, float]:
    """Time of one slot of each kind: a chunk's share of the stage."""
    share = 1 / schedule.num_chunks
    return {"forward": share, "backward": (1 if schedule.split else 2) * share, "weight": share}


@dataclass(frozen=True)
class Walk:
    """Every slot of a table in an order in which all that one needs is before it: a column of the list per field.

    `needs` is the place in the list of what a slot waits for from another virtual stage, -1 for nothing; `travels`
    whether that comes from another stage. `joined` are forwards that run together with the slot after them, the
    backward of the same tick.
    """

    num_stages: int
    stages: list[int]
    slots: list[Slot]
    virtuals: list[int]
    works: list[Work]
    needs: list[int]
    travels: list[bool]
    joined: set[int]


def walk(schedule: Schedule) -> Walk:
    """Rows of the table one after the other: what a slot needs ran in an earlier row, or before it in its entry."""
    num_stages, last = schedule.num_stages, schedule.num_virtual - 1
    chunks = range(schedule.num_chunks)
    virtual_of = [[schedule.virtual(stage, chunk) for chunk in chunks] for stage in range(num_stages)]
    stage_of = [schedule.place(virtual)[0] for virtual in range(schedule.num_virtual)]
    count = schedule.num_microbatches
    # by virtual stage and microbatch, flat
    forwards, backwards = ([-1] * (schedule.num_virtual * count) for _ in range(2))
    found = Walk(num_stages, [], [], [], [], [], [], set())

    def add(stage: int, slot: Slot, virtual: int, work: Work, needs: int, travels: bool) -> None:
        found.stages.append(stage)
        found.slots.append(slot)
        found.virtuals.append(virtual)
        found.works.append(work)
        found.needs.append(needs)
        found.travels.append(travels)

    for row in schedule.table:
        for stage, entry in enumerate(row):
            if schedule.overlap and entry.is_pair:
                found.joined.add(len(found.stages))
            if (work := entry.forward) is not None:
                virtual = virtual_of[stage][work.chunk]
                place = virtual * count + work.microbatch
                forwards[place] = len(found.stages)
                needs = forwards[place - count] if virtual > 0 else -1
                add(stage, "forward", virtual, work, needs, needs >= 0 and stage_of[virtual - 1] != stage)
            if (work := entry.backward) is not None:
                virtual = virtual_of[stage][work.chunk]
                place = virtual * count + work.microbatch
                backwards[place] = len(found.stages)
                needs = backwards[place + count] if virtual < last else -1
                add(stage, "backward", virtual, work, needs, needs >= 0 and stage_of[virtual + 1] != stage)
            if (work := entry.weight) is not None:
                add(stage, "weight", virtual_of[stage][work.chunk], work, -1, False)
    return found


def times(
    walk: Walk,
    durations: Mapping[Slot, Sequence[float]],
    *,
    latency: float = 0.0,
    saved: Mapping[tuple[int, int], float] | None = None,
) -> tuple[list[float], list[float]]:
    """When each slot of a walk starts and ends, as early as its stage and its input allow; there is no common clock.

    `durations` are by slot and virtual stage, in any unit; a message arrives `latency` after its slot's end. `saved`
    are by the virtual stages of a forward and a backward that run together what they take less than in turn.
    """
    free = [0.0] * walk.num_stages
    begun: list[float] = []
    ends: list[float] = []
    joined, saved = walk.joined, saved or {}
    columns = zip(walk.stages, walk.slots, walk.virtuals, walk.needs, walk.travels, strict=True)
    for place, (stage, slot, virtual, needs, travels) in enumerate(columns):
        if joined and place - 1 in joined:
            # ended with its forward
            begun.append(free[stage] - durations[slot][virtual])
            ends.append(free[stage])
            continue
        start = free[stage]
        if needs >= 0:
            arrival = ends[needs] + latency if travels else ends[needs]
            if arrival > start:
                start = arrival
        end = start + durations[slot][virtual]
        if joined and place in joined:
            back, needs = walk.virtuals[place + 1], walk.needs[place + 1]
            if needs >= 0:
                start = max(start, ends[needs] + latency * walk.travels[place + 1])
            together = durations[slot][virtual] + durations["backward"][back]
            end = start + together - saved.get((virtual, back), 0.0)
        free[stage] = end
        begun.append(start)
        ends.append(end)
    return begun, ends


def timeline(
    schedule: Schedule, *, durations: Mapping[Slot, Sequence[float]] | None = None, latency: float = 0.0
) -> list[list[Span]]:
    """Each stage's slots in order, as `times` places them; without `durations` chunks take what `slot_costs` says."""
    if durations is None:
        durations = {slot: [cost] * schedule.num_virtual for slot, cost in slot_costs(schedule).items()}
    walked = walk(schedule)
    spans: list[list[Span]] = [[] for _ in range(schedule.num_stages)]
    begun, _ = times(walked, durations, latency=latency)
    for stage, slot, virtual, work, start in zip(
        walked.stages, walked.slots, walked.virtuals, walked.works, begun, strict=True
    ):
        spans[stage].append(Span(slot, work, start, start + durations[slot][virtual]))
    return spans


def slots(entry: Entry) -> list[tuple[Slot, Work]]:
    """What the entry runs, in order."""
    found: list[tuple[Slot, Work]] = []
    if entry.forward is not None:
        found.append(("forward", entry.forward))
    if entry.backward is not None:
        found.append(("backward", entry.backward))
    if entry.weight is not None:
        found.append(("weight", entry.weight))
    return found


def _cost(entry: Entry, costs: dict[Slot, float]) -> float:
    return sum(costs[slot] for slot, _ in slots(entry))


def _warm_up(column: tuple[Entry, ...]) -> int:
    forwards = 0
    for entry in column:
        forwards += entry.forward is not None
        if entry.backward is not None:
            break
    return max(0, forwards - 1)


def _ideal_ticks(column: tuple[Entry, ...]) -> int:
    """Singly filled entries take a tick a slot; where entries pair slots, the most numerous kind decides."""
    counts = Counter(slot for entry in column for slot, _ in slots(entry))
    paired = any(len(slots(entry)) > 1 for entry in column)
    return max(counts.values()) if paired else sum(counts.values())

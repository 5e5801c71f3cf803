"""From a schedule to what the executor reads at each tick: buffer slots, arrivals, and how big the buffers must be."""

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Generic, Literal, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Int32

from jaxtron.pipeline.schedules.schedule import Schedule, Work

IntTable = Int32[np.ndarray, "T P"]
Leaf = TypeVar("Leaf")
# (source, destination)
Pairs = tuple[tuple[int, int], ...]
# ticks in an iteration of a loop over them: schedules repeat themselves after one, two, three or six
PERIODS = (1, 2, 3, 6)
# loops end at so many ticks at most, so that long schedules are cut as fast as short ones
MOST_CUTS = 96
# messages sent over messages needed; a table that is too irregular for it sends more
MOST_SENT = 2
# a kind of work is worth compiling once more for a sixteenth of the messages, or less if the limit asks for it
WORKS_FOR_ALL_MESSAGES = (16, 256, 20)
# (stage, virtual stage, microbatch)
Place = tuple[int, int, int]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("active", "microbatch", "chunk", "enters", "is_last", "activation", "gradient", "residual", "pair"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Slots(Generic[Leaf]):
    """One kind of work, whether there is any, on what, and the buffer slots that it uses; tables of it or a tick's."""

    active: Leaf
    microbatch: Leaf
    chunk: Leaf
    enters: Leaf
    """The stack that begins with this virtual stage, or -1."""
    is_last: Leaf
    """The virtual stage with the head and the loss."""
    activation: Leaf
    """Where a forward's input waits, and stays until the backward if a later stack begins with it."""
    gradient: Leaf
    """Where a backward's cotangent waits; the last virtual stage's forward puts it there itself."""
    residual: Leaf
    """What a forward leaves for its backward."""
    pair: Leaf
    """What a backward leaves for its weight gradients."""


@dataclass(frozen=True)
class _Stacks:
    """Which virtual stages each stack has: those of the first stack come first."""

    chunks: tuple[int, ...]
    """Chunks that a stage has of each stack."""
    num_stages: int

    def of(self, virtual: int) -> int:
        """The stack of a virtual stage."""
        return bisect.bisect_right(self._ends, virtual)

    def enters(self, virtual: int) -> int:
        """The stack that begins with a virtual stage, or -1."""
        return self.of(virtual) if virtual == 0 or virtual in self._ends else -1

    @cached_property
    def _ends(self) -> list[int]:
        return [chunks * self.num_stages for chunks in itertools.accumulate(self.chunks)]


@dataclass(frozen=True)
class Channel:
    """Messages of one kind in one direction: the (source, destination) stages; no pairs: a stage's message to itself.

    `slots[tick, stage]` is where an arrival is kept, and the buffer's spare slot, its last, where none arrives.
    """

    pairs: Pairs
    slots: IntTable

    def needed(self, start: int, stop: int, period: int, phase: int, spare: int) -> Pairs:
        """The pairs with a message at any of these ticks."""
        receives = (self.slots[start + phase : stop : period] != spare).any(0)
        return tuple(pair for pair in self.pairs if receives[pair[1]])


@dataclass(frozen=True)
class Segment:
    """Ticks from `start` to before `stop` that run as one loop, `period` of them in an iteration.

    Who sends to whom must be known when the program is compiled, so each tick of an iteration has pairs of its own:
    stages whose work alternates do not send empty messages in between.
    """

    start: int
    stop: int
    period: int
    activations: tuple[tuple[Pairs, ...], ...]
    """By tick of an iteration and channel."""
    gradients: tuple[tuple[Pairs, ...], ...]

    @property
    def num_sent(self) -> int:
        """Messages sent, empty ones included."""
        phases = zip(self.activations, self.gradients, strict=True)
        each = (sum(map(len, (*activations, *gradients))) for activations, gradients in phases)
        return sum(each) * -((self.start - self.stop) // self.period)


@dataclass(frozen=True)
class Program:
    """A schedule lowered to tables by [tick, stage], and the slots that each buffer needs (without the spare one)."""

    schedule: Schedule
    forward: Slots[IntTable]
    backward: Slots[IntTable]
    weight: Slots[IntTable]
    activations: tuple[Channel, ...]
    """They arrive at the end of the tick that sent them."""
    gradients: tuple[Channel, ...]
    """They arrive at the beginning of the tick after the one that sent them."""
    num_activations: int
    num_gradients: int
    num_residuals: tuple[int, ...]
    """By stack, each having buffers of its own."""
    num_pairs: tuple[int, ...]


def lower(schedule: Schedule, stack_chunks: tuple[int, ...] | None = None) -> Program:
    """The schedule's buffers and messages; each slot is used again as soon as the table allows.

    `stack_chunks` are the chunks that a stage has of each stack, in order (none: one stack has all). A table without
    backwards runs forwards alone (evaluation).
    """
    stacks = _Stacks(stack_chunks or (schedule.num_chunks,), schedule.num_stages)
    assert sum(stacks.chunks) == schedule.num_chunks
    forward, backward, weight = (_ticks(schedule, kind) for kind in ("forward", "backward", "weight"))
    last = schedule.num_virtual - 1

    def sent(ticks: dict[Place, int], virtual: int, microbatch: int) -> int:
        return ticks[schedule.place(virtual)[0], virtual, microbatch]

    # spans of time that a slot is taken: a tick has three points, as its three slots run
    activations = {
        # what enters a later stack is there for its backward too
        key: (
            3 * sent(forward, key[1] - 1, key[2]) + 2,
            max(3 * tick, 3 * backward.get(key, -1) + 1 if stacks.enters(key[1]) > 0 else 0),
        )
        for key, tick in forward.items()
        if key[1] > 0
    }
    gradients = {
        key: (3 * forward[key] if key[1] == last else 3 * sent(backward, key[1] + 1, key[2]) + 3, 3 * tick + 1)
        for key, tick in backward.items()
    }
    residuals = {key: (3 * forward[key], 3 * tick + 1) for key, tick in backward.items()}
    pairs = {key: (3 * backward[key] + 1, 3 * tick + 2) for key, tick in weight.items()}
    activation, num_activations = _allocate(activations)
    gradient, num_gradients = _allocate(gradients)
    residual, num_residuals = _allocate_by_stack(residuals, stacks)
    pair, num_pairs = _allocate_by_stack(pairs, stacks)
    slots = partial(_slots, schedule, stacks, activation=activation, gradient=gradient, residual=residual, pair=pair)
    return Program(
        schedule,
        forward=slots("forward"),
        backward=slots("backward"),
        weight=slots("weight"),
        activations=_channels(schedule, forward, activation, spare=num_activations, step=1, delay=0),
        gradients=_channels(schedule, backward, gradient, spare=num_gradients, step=-1, delay=1),
        num_activations=num_activations,
        num_gradients=num_gradients,
        num_residuals=num_residuals,
        num_pairs=num_pairs,
    )


def segments(program: Program) -> tuple[Segment, ...]:
    """The loops that run the ticks: few messages for few ticks to compile, and at most `MOST_SENT` times the needed.

    What a stage's work costs to compile is priced in messages, cheaper until the limit is kept.
    """
    needed = sum(int((channel.slots != spare).sum()) for channel, spare in _all_channels(program) if channel.pairs)
    for worth in np.geomspace(*WORKS_FOR_ALL_MESSAGES):
        cuts = _cheapest_cuts(program, max(1, needed) / worth)
        loops = tuple(_segment(program, start, stop, period) for start, stop, period in cuts)
        if sum(loop.num_sent for loop in loops) <= MOST_SENT * needed:
            break
    return loops


def message_counts(program: Program) -> tuple[int, int]:
    """Messages sent in a step, empty ones included, and messages needed."""
    needed = sum(int((channel.slots != spare).sum()) for channel, spare in _all_channels(program) if channel.pairs)
    return sum(loop.num_sent for loop in segments(program)), needed


def reached(program: Program, kind: Literal["forward", "backward", "weight"]) -> int:
    """Ticks at which a stage comes by this kind of work in the compiled loops, whether it has any or not."""
    active = getattr(program, kind).active
    return sum(
        -((loop.start - loop.stop) // loop.period)
        for loop in segments(program)
        for phase in range(loop.period)
        if active[loop.start + phase : loop.stop : loop.period].any()
    )


def _all_channels(program: Program) -> list[tuple[Channel, int]]:
    """Each with its buffer's spare slot."""
    activations = [(channel, program.num_activations) for channel in program.activations]
    return activations + [(channel, program.num_gradients) for channel in program.gradients]


def _cheapest_cuts(program: Program, price: float) -> list[tuple[int, int, int]]:
    """Cuts of the ticks into loops (start, stop, period) that cost least, by dynamic programming over where they end.

    A loop costs the messages it sends, and `price` for each kind of work that a tick of its iteration compiles.
    """
    num_ticks = program.schedule.num_ticks
    kinds = [slots.active.any(1, keepdims=True) for slots in (program.forward, program.backward, program.weight)]
    messages = [
        channel.slots[:, [destination for _, destination in channel.pairs]] != spare
        for channel, spare in _all_channels(program)
    ]
    events = np.concatenate([*messages, *kinds], 1)
    periods = _periods(program.schedule)
    counts = {period: _counts(events, period) for period in periods}
    bounds = _ends(num_ticks, math.lcm(*periods), int(kinds[1].argmax()), num_ticks - int(kinds[0][::-1].argmax()))
    costs, cuts = [0.0], [(0, 0)]
    for index, stop in enumerate(bounds[1:], 1):
        starts, choices = bounds[:index], []
        for period, before in counts.items():
            happens = (before[stop] > before[starts]).sum(1)
            sent = happens[:, : -len(kinds)].sum(1) * -((starts - stop) // period)
            total = costs + sent + price * happens[:, -len(kinds) :].sum(1)
            if stop < num_ticks:
                # idle ticks at the end of an iteration would lose what the last tick sends
                total = np.where((stop - starts) % period, np.inf, total)
            best = int(total.argmin())
            choices.append((float(total[best]), best, period))
        cost, *cut = min(choices)
        costs.append(cost)
        cuts.append(tuple(cut))
    loops, index = [], len(bounds) - 1
    while index:
        start, period = cuts[index]
        loops.append((int(bounds[start]), int(bounds[index]), period))
        index = start
    return loops[::-1]


def _periods(schedule: Schedule) -> tuple[int, ...]:
    """Ticks that an iteration of a loop may have."""
    # on one stage a microbatch goes through its chunks there and back before the next begins
    return tuple({*PERIODS, 2 * schedule.num_chunks - 1}) if schedule.num_stages == 1 else PERIODS


def _ends(num_ticks: int, whole: int, first_backward: int, last_forward: int) -> Int32[np.ndarray, "ends"]:
    """Where loops may begin and end: every tick, or of many ticks some that lie whole periods (`whole`) apart."""
    step = 1 if num_ticks <= MOST_CUTS else whole * -(-num_ticks // (MOST_CUTS * whole))
    ends = {tick for start in (0, first_backward, last_forward) for tick in range(start % step, num_ticks, step)}
    return np.array(sorted({0, *ends, num_ticks}), np.int32)


def _counts(events: Bool[np.ndarray, "T E"], period: int) -> Int32[np.ndarray, "T+1 k E"]:
    """How often each event has happened before a tick, by the tick's place in the period."""
    here = np.arange(len(events))[:, None] % period == np.arange(period)
    counts = (here[..., None] & events[:, None]).cumsum(0, dtype=np.int32)
    return np.concatenate([np.zeros_like(counts[:1]), counts])


def _segment(program: Program, start: int, stop: int, period: int) -> Segment:
    def pairs(channels: tuple[Channel, ...], spare: int) -> tuple[tuple[Pairs, ...], ...]:
        return tuple(
            tuple(channel.needed(start, stop, period, phase, spare) for channel in channels) for phase in range(period)
        )

    return Segment(
        start,
        stop,
        period,
        activations=pairs(program.activations, program.num_activations),
        gradients=pairs(program.gradients, program.num_gradients),
    )


def _works(schedule: Schedule, kind: str) -> Iterator[tuple[int, int, Work]]:
    """(tick, stage, work) of every slot of this kind."""
    for tick, row in enumerate(schedule.table):
        for stage, entry in enumerate(row):
            work = getattr(entry, kind)
            if work is not None:
                yield tick, stage, work


def _ticks(schedule: Schedule, kind: str) -> dict[Place, int]:
    return {
        (stage, schedule.virtual(stage, work.chunk), work.microbatch): tick
        for tick, stage, work in _works(schedule, kind)
    }


def _allocate(spans: dict[Place, tuple[int, int]]) -> tuple[dict[Place, int], int]:
    """A slot for each span so that those of a stage that share one do not overlap, and the most slots of a stage."""
    slots: dict[Place, int] = {}
    busy: dict[int, list[tuple[int, int]]] = {}
    free: dict[int, list[int]] = {}
    for key, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        stage_busy, stage_free = busy.setdefault(key[0], []), free.setdefault(key[0], [])
        while stage_busy and stage_busy[0][0] < start:
            heapq.heappush(stage_free, heapq.heappop(stage_busy)[1])
        slot = heapq.heappop(stage_free) if stage_free else len(stage_busy)
        slots[key] = slot
        heapq.heappush(stage_busy, (end, slot))
    return slots, max(slots.values(), default=-1) + 1


def _allocate_by_stack(
    spans: dict[Place, tuple[int, int]], stacks: _Stacks
) -> tuple[dict[Place, int], tuple[int, ...]]:
    """As `_allocate`, each stack with slots of its own: what they hold differs."""
    slots: dict[Place, int] = {}
    counts = []
    for stack in range(len(stacks.chunks)):
        own, count = _allocate({key: span for key, span in spans.items() if stacks.of(key[1]) == stack})
        slots |= own
        counts.append(count)
    return slots, tuple(counts)


def _slots(schedule: Schedule, stacks: _Stacks, kind: str, **buffers: dict[Place, int]) -> Slots[IntTable]:
    tables = {field.name: _zeros(schedule) for field in fields(Slots)}
    for tick, stage, work in _works(schedule, kind):
        virtual = schedule.virtual(stage, work.chunk)
        key = (stage, virtual, work.microbatch)
        values = {
            "active": 1,
            "microbatch": work.microbatch,
            "chunk": work.chunk,
            "enters": stacks.enters(virtual),
            "is_last": virtual == schedule.num_virtual - 1,
        }
        values |= {name: slots.get(key, 0) for name, slots in buffers.items()}
        for name, value in values.items():
            tables[name][tick, stage] = value
    return Slots(**tables)


def _channels(
    schedule: Schedule, ticks: dict[Place, int], slots: dict[Place, int], *, spare: int, step: int, delay: int
) -> tuple[Channel, ...]:
    """The messages from each virtual stage to the next (`step` 1) or to the one before (-1), by direction."""
    routes: dict[int, tuple[set[tuple[int, int]], IntTable]] = {}
    for (source, virtual, microbatch), tick in ticks.items():
        if not 0 <= virtual + step < schedule.num_virtual:
            continue
        destination = schedule.place(virtual + step)[0]
        shift = _shift(destination - source, schedule.num_stages)
        pairs, table = routes.setdefault(shift, (set(), _zeros(schedule) + np.int32(spare)))
        pairs.add((source, destination))
        table[tick + delay, destination] = slots[destination, virtual + step, microbatch]
    return tuple(
        Channel(tuple(sorted(pairs)) if shift else (), table) for shift, (pairs, table) in sorted(routes.items())
    )


def _shift(distance: int, num_stages: int) -> int:
    """Direction along the ring of stages: 1, -1, or 0 for a message that stays."""
    return distance % num_stages if num_stages <= 2 else (distance + 1) % num_stages - 1


def _zeros(schedule: Schedule) -> IntTable:
    return np.zeros((schedule.num_ticks, schedule.num_stages), np.int32)

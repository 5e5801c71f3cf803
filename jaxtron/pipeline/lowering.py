"""From a schedule to what the executor reads at each tick: buffer slots, arrivals, and how big the buffers must be."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial

import jax
import numpy as np
from jaxtyping import Int32

from jaxtron.pipeline.schedule import Schedule, Work

IntTable = Int32[np.ndarray, "T P"]
# (source, destination)
Pairs = tuple[tuple[int, int], ...]
# an iteration of the loop over ticks has at most so many
PERIODS = (1, 2, 3)
# messages over needed messages with which a loop is good enough not to look for one of more parts
GOOD_ENOUGH = 1.25
# (stage, virtual stage, microbatch)
Place = tuple[int, int, int]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("active", "microbatch", "chunk", "is_first", "is_last", "activation", "gradient", "residual", "pair"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Slots:
    """One kind of work, for every tick and stage: whether there is any, on what, and the buffer slots that it uses."""

    active: IntTable
    microbatch: IntTable
    chunk: IntTable
    is_first: IntTable
    """The virtual stage with the embedding."""
    is_last: IntTable
    """The virtual stage with the head and the loss."""
    activation: IntTable
    """Where a forward's input waits."""
    gradient: IntTable
    """Where a backward's cotangent waits; the last virtual stage's forward puts it there itself."""
    residual: IntTable
    """What a forward leaves for its backward."""
    pair: IntTable
    """What a backward leaves for its weight gradients."""


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
    forward: Slots
    backward: Slots
    weight: Slots
    activations: tuple[Channel, ...]
    """They arrive at the end of the tick that sent them."""
    gradients: tuple[Channel, ...]
    """They arrive at the beginning of the tick after the one that sent them."""
    num_activations: int
    num_gradients: int
    num_residuals: int
    num_pairs: int


def lower(schedule: Schedule) -> Program:
    """The schedule's buffers and messages; each slot is used again as soon as the table allows.

    A table without backwards runs forwards alone (evaluation).
    """
    forward, backward, weight = (_ticks(schedule, kind) for kind in ("forward", "backward", "weight"))
    last = schedule.num_virtual - 1

    def sent(ticks: dict[Place, int], virtual: int, microbatch: int) -> int:
        return ticks[schedule.place(virtual)[0], virtual, microbatch]

    # spans of time that a slot is taken: a tick has three points, as its three slots run
    activations = {
        key: (3 * sent(forward, key[1] - 1, key[2]) + 2, 3 * tick) for key, tick in forward.items() if key[1] > 0
    }
    gradients = {
        key: (3 * forward[key] if key[1] == last else 3 * sent(backward, key[1] + 1, key[2]) + 3, 3 * tick + 1)
        for key, tick in backward.items()
    }
    residuals = {key: (3 * forward[key], 3 * tick + 1) for key, tick in backward.items()}
    pairs = {key: (3 * backward[key] + 1, 3 * tick + 2) for key, tick in weight.items()}
    activation, num_activations = _allocate(activations)
    gradient, num_gradients = _allocate(gradients)
    residual, num_residuals = _allocate(residuals)
    pair, num_pairs = _allocate(pairs)
    slots = partial(_slots, schedule, activation=activation, gradient=gradient, residual=residual, pair=pair)
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
    """The loops that run the ticks: as few parts as send hardly more than the needed messages, else fewest messages.

    A part is a tick to compile. Where the first forwards and the last backwards are alone, they may be loops of their
    own.
    """
    candidates = [
        [_segment(program, start, stop, min(period, stop - start)) for start, stop, period in loops]
        for period in PERIODS
        for loops in _cuts(program, period)
    ]
    needed = sum(
        int((channel.slots != spare).sum())
        for channels, spare in (
            (program.activations, program.num_activations),
            (program.gradients, program.num_gradients),
        )
        for channel in channels
        if channel.pairs
    )

    def rank(loops: list[Segment]) -> tuple[float, int]:
        return max(sum(loop.num_sent for loop in loops), GOOD_ENOUGH * needed), sum(loop.period for loop in loops)

    return tuple(min(candidates, key=rank))


def _cuts(program: Program, period: int) -> Iterator[list[tuple[int, int, int]]]:
    """Ways to cut the ticks into (start, stop, period): whole, or with the ends, where half of the work is missing,
    apart."""
    num_ticks = program.schedule.num_ticks
    yield [(0, num_ticks, period)]
    backward, forward = program.backward.active.any(1), program.forward.active.any(1)
    if not backward.any():
        return
    first, last = int(backward.argmax()), num_ticks - int(forward[::-1].argmax())
    # the middle is whole iterations
    last = min(num_ticks, last + (first - last) % period)
    loops = [(0, first, 1), (first, last, period), (last, num_ticks, 1)]
    yield [loop for loop in loops if loop[0] < loop[1]]


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


def _slots(schedule: Schedule, kind: str, **buffers: dict[Place, int]) -> Slots:
    tables = {field.name: _zeros(schedule) for field in fields(Slots)}
    for tick, stage, work in _works(schedule, kind):
        virtual = schedule.virtual(stage, work.chunk)
        key = (stage, virtual, work.microbatch)
        values = {
            "active": 1,
            "microbatch": work.microbatch,
            "chunk": work.chunk,
            "is_first": virtual == 0,
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
    return distance % 2 if num_stages == 2 else (distance + 1) % num_stages - 1


def _zeros(schedule: Schedule) -> IntTable:
    return np.zeros((schedule.num_ticks, schedule.num_stages), np.int32)

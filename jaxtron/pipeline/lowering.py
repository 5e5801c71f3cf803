"""From a schedule to what the executor reads at each tick: buffer slots, arrivals, and how big the buffers must be."""

import bisect
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Generic, TypeVar

import jax
import numpy as np
from jaxtyping import Int32

from jaxtron.pipeline.schedules.schedule import Schedule, Work

IntTable = Int32[np.ndarray, "T P"]
Leaf = TypeVar("Leaf")
# (source, destination)
Routes = tuple[tuple[int, int], ...]
# (stage, virtual stage, microbatch)
Place = tuple[int, int, int]
# the span of time that each one's slot is taken: a tick has three points, as its three slots run
Spans = dict[Place, tuple[int, int]]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("active", "microbatch", "chunk", "enters", "is_last", "input", "cotangent", "residual", "deferred"),
    meta_fields=(),
)
@dataclass(frozen=True)
class WorkTable(Generic[Leaf]):
    """One kind of work, whether there is any, on what, and the buffer slots that it uses; tables of it or a tick's."""

    active: Leaf
    microbatch: Leaf
    chunk: Leaf
    enters: Leaf
    """The stack that begins with this virtual stage, or -1."""
    is_last: Leaf
    """The virtual stage with the head and the loss."""
    input: Leaf
    """Where a forward's input waits, and stays until the backward if a later stack begins with it."""
    cotangent: Leaf
    """Where a backward's cotangent waits; the last virtual stage's forward puts it there itself."""
    residual: Leaf
    """What a forward leaves for its backward, and for its weight gradients where these are put off."""
    deferred: Leaf
    """What a backward leaves for its weight gradients besides."""


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
    """Messages of one kind in one direction: the (source, destination) stages; no routes: a stage's message to itself.

    `slots[tick, stage]` is where an arrival is kept, and the buffer's spare slot, its last, where none arrives.
    """

    routes: Routes
    slots: IntTable

    def needed(self, start: int, stop: int, period: int, phase: int, spare: int) -> Routes:
        """The routes with a message at any of these ticks."""
        receives = (self.slots[start + phase : stop : period] != spare).any(0)
        return tuple(route for route in self.routes if receives[route[1]])


@dataclass(frozen=True)
class LoweredSchedule:
    """A schedule lowered to tables by [tick, stage], and the slots that each buffer needs (without the spare one)."""

    schedule: Schedule
    forward: WorkTable[IntTable]
    backward: WorkTable[IntTable]
    weight: WorkTable[IntTable]
    paired: IntTable
    """Where a forward and a backward run together: 1, and 0 elsewhere."""
    inputs: tuple[Channel, ...]
    """They arrive at the end of the tick that sent them."""
    cotangents: tuple[Channel, ...]
    """They arrive at the beginning of the tick after the one that sent them."""
    num_inputs: int
    num_cotangents: int
    num_residuals: tuple[int, ...]
    """By stack, each having buffers of its own."""
    num_deferred: tuple[int, ...]

    @cached_property
    def alone(self) -> tuple[WorkTable[IntTable], WorkTable[IntTable], WorkTable[IntTable]]:
        """Forwards, backwards and weight gradients, active where they run by themselves."""
        forward, backward = (
            replace(work, active=work.active * (1 - self.paired)) for work in (self.forward, self.backward)
        )
        return forward, backward, self.weight


def lower(schedule: Schedule, stack_chunks: tuple[int, ...] | None = None) -> LoweredSchedule:
    """The schedule's buffers and messages; each slot is used again as soon as the table allows.

    `stack_chunks` are the chunks that a stage has of each stack, in order (none: one stack has all). A table without
    backwards runs forwards alone (evaluation).
    """
    stacks = _Stacks(stack_chunks or (schedule.num_chunks,), schedule.num_stages)
    assert sum(stacks.chunks) == schedule.num_chunks
    forward, backward, weight = (_ticks(schedule, kind) for kind in ("forward", "backward", "weight"))
    inputs, cotangents = _message_spans(schedule, stacks, forward, backward)
    residuals = {
        key: (3 * forward[key], 3 * weight[key] + 2 if key in weight else 3 * tick + 1)
        for key, tick in backward.items()
    }
    deferred = {key: (3 * backward[key] + 1, 3 * tick + 2) for key, tick in weight.items()}
    slots: dict[str, dict[Place, int]] = {}
    slots["input"], num_inputs = _allocate(inputs)
    slots["cotangent"], num_cotangents = _allocate(cotangents)
    slots["residual"], num_residuals = _allocate_by_stack(residuals, stacks)
    slots["deferred"], num_deferred = _allocate_by_stack(deferred, stacks)
    return LoweredSchedule(
        schedule,
        forward=_work_table(schedule, stacks, "forward", slots),
        backward=_work_table(schedule, stacks, "backward", slots),
        weight=_work_table(schedule, stacks, "weight", slots),
        paired=_paired(schedule),
        inputs=_channels(schedule, forward, slots["input"], spare=num_inputs, step=1, delay=0),
        cotangents=_channels(schedule, backward, slots["cotangent"], spare=num_cotangents, step=-1, delay=1),
        num_inputs=num_inputs,
        num_cotangents=num_cotangents,
        num_residuals=num_residuals,
        num_deferred=num_deferred,
    )


def _message_spans(
    schedule: Schedule, stacks: _Stacks, forward: dict[Place, int], backward: dict[Place, int]
) -> tuple[Spans, Spans]:
    """How long each forward's input, and each backward's cotangent, takes its slot."""
    last = schedule.num_virtual - 1

    def sent(ticks: dict[Place, int], virtual: int, microbatch: int) -> int:
        return ticks[schedule.place(virtual)[0], virtual, microbatch]

    inputs = {}
    for key, tick in forward.items():
        _, virtual, microbatch = key
        if virtual > 0:
            # what enters a later stack is there for its backward too
            stays = stacks.enters(virtual) > 0 and key in backward
            inputs[key] = (3 * sent(forward, virtual - 1, microbatch) + 2, 3 * backward[key] + 1 if stays else 3 * tick)
    cotangents = {}
    for key, tick in backward.items():
        _, virtual, microbatch = key
        arrives = 3 * forward[key] if virtual == last else 3 * sent(backward, virtual + 1, microbatch) + 3
        cotangents[key] = (arrives, 3 * tick + 1)
    return inputs, cotangents


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


def _allocate(spans: Spans) -> tuple[dict[Place, int], int]:
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


def _allocate_by_stack(spans: Spans, stacks: _Stacks) -> tuple[dict[Place, int], tuple[int, ...]]:
    """As `_allocate`, each stack with slots of its own: what they hold differs."""
    slots: dict[Place, int] = {}
    counts = []
    for stack in range(len(stacks.chunks)):
        own, count = _allocate({key: span for key, span in spans.items() if stacks.of(key[1]) == stack})
        slots |= own
        counts.append(count)
    return slots, tuple(counts)


def _work_table(
    schedule: Schedule, stacks: _Stacks, kind: str, slots: dict[str, dict[Place, int]]
) -> WorkTable[IntTable]:
    """The table of one kind of work; `slots` by buffer."""
    tables = {field.name: _zeros(schedule) for field in fields(WorkTable)}
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
        values |= {buffer: of_buffer.get(key, 0) for buffer, of_buffer in slots.items()}
        for name, value in values.items():
            tables[name][tick, stage] = value
    return WorkTable(**tables)


def _paired(schedule: Schedule) -> IntTable:
    """Of a schedule that overlaps, where a stage has a pair."""
    table = _zeros(schedule)
    if schedule.overlap:
        table[:] = [[entry.is_pair for entry in row] for row in schedule.table]
    return table


def _channels(
    schedule: Schedule, ticks: dict[Place, int], slots: dict[Place, int], *, spare: int, step: int, delay: int
) -> tuple[Channel, ...]:
    """The messages from each virtual stage to the next (`step` 1) or to the one before (-1), by direction."""
    found: dict[int, tuple[set[tuple[int, int]], IntTable]] = {}
    for (source, virtual, microbatch), tick in ticks.items():
        if not 0 <= virtual + step < schedule.num_virtual:
            continue
        destination = schedule.place(virtual + step)[0]
        shift = _shift(destination - source, schedule.num_stages)
        routes, table = found.setdefault(shift, (set(), _zeros(schedule) + np.int32(spare)))
        routes.add((source, destination))
        table[tick + delay, destination] = slots[destination, virtual + step, microbatch]
    return tuple(
        Channel(tuple(sorted(routes)) if shift else (), table) for shift, (routes, table) in sorted(found.items())
    )


def _shift(distance: int, num_stages: int) -> int:
    """Direction along the ring of stages: 1, -1, or 0 for a message that stays."""
    return distance % num_stages if num_stages <= 2 else (distance + 1) % num_stages - 1


def _zeros(schedule: Schedule) -> IntTable:
    return np.zeros((schedule.num_ticks, schedule.num_stages), np.int32)

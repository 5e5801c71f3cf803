"""From what each stage does in order to a table: every step at the first tick at which its inputs are there."""

from collections.abc import Mapping, Sequence

from jaxtron.config import UserError
from jaxtron.pipeline.schedules.schedule import IDLE, ChunkPlacement, Entry, Schedule


def schedule_in_order(
    name: str,
    orders: Sequence[Sequence[Entry]],
    num_microbatches: int,
    *,
    num_chunks: int = 1,
    placement: ChunkPlacement = "round_robin",
) -> Schedule:
    """The table of stages that run their steps in order, one a tick, idling until inputs have arrived.

    `orders` has each stage's steps. Raises `UserError` when the stages would wait for one another for ever.
    """
    num_stages = len(orders)
    empty = Schedule(name, ((IDLE,) * num_stages,), num_microbatches, num_chunks, placement)
    places = [[empty.virtual(stage, chunk) for chunk in range(num_chunks)] for stage in range(num_stages)]
    # [virtual][microbatch]: the tick at which it ran
    forwards: list[dict[int, int]] = [{} for _ in range(empty.num_virtual)]
    backwards: list[dict[int, int]] = [{} for _ in range(empty.num_virtual)]
    rows: list[dict[int, Entry]] = [{} for _ in range(num_stages)]
    positions, free = [0] * num_stages, [0] * num_stages
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            virtual_of, row = places[stage], rows[stage]
            position, tick = positions[stage], free[stage]
            while position < len(order):
                step = order[position]
                start = _start(step, tick, virtual_of, forwards, backwards)
                if start is None:
                    break
                if step.forward is not None:
                    forwards[virtual_of[step.forward.chunk]][step.forward.microbatch] = start
                if step.backward is not None:
                    backwards[virtual_of[step.backward.chunk]][step.backward.microbatch] = start
                row[start] = step
                position, tick, moved = position + 1, start + 1, True
            positions[stage], free[stage] = position, tick
    for stage, order in enumerate(orders):
        if positions[stage] < len(order):
            step = order[positions[stage]]
            raise UserError(f"schedule {name}: stage {stage} waits for ever at its step {positions[stage]}, {step}")
    return Schedule(name, make_table(rows), num_microbatches, num_chunks, placement)


def make_table(rows: Sequence[Mapping[int, Entry]]) -> tuple[tuple[Entry, ...], ...]:
    """Ticks by stages, from each stage's entries by tick."""
    num_ticks = 1 + max(max(row) for row in rows)
    return tuple(tuple(row.get(tick, IDLE) for row in rows) for tick in range(num_ticks))


def _start(
    step: Entry,
    tick: int,
    virtual_of: list[int],
    forwards: list[dict[int, int]],
    backwards: list[dict[int, int]],
) -> int | None:
    """The first tick, not before `tick`, when the step can run; None while one of its inputs has no tick yet."""
    work = step.forward
    if work is not None:
        virtual = virtual_of[work.chunk]
        if virtual > 0:
            done = forwards[virtual - 1].get(work.microbatch)
            if done is None:
                return None
            tick = max(tick, done + 1)
    work = step.backward
    if work is not None:
        virtual = virtual_of[work.chunk]
        if virtual + 1 < len(backwards):
            done = backwards[virtual + 1].get(work.microbatch)
            if done is None:
                return None
            tick = max(tick, done + 1)
    return tick

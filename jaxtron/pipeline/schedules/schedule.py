"""A schedule is data: what every stage does at every tick, as a table testable without a device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jaxtron.config import UserError

ChunkPlacement = Literal["round_robin", "v_shape"]


@dataclass(frozen=True)
class Work:
    """One microbatch through one of the stage's chunks of layers."""

    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Entry:
    """One tick of one stage: up to three slots, run in this order; None is idle.

    `backward` is the whole backward, or only the input gradient where the schedule has weight slots.
    """

    forward: Work | None = None
    backward: Work | None = None
    weight: Work | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs."""
        return self.forward is None and self.backward is None and self.weight is None

    @property
    def is_pair(self) -> bool:
        """Whether there are a forward and a backward, of which neither waits for the other.

        The last virtual stage's forward makes the cotangent of its own backward.
        """
        return self.forward is not None and self.backward is not None and self.forward != self.backward


IDLE = Entry()


@dataclass(frozen=True)
class Schedule:
    """Rows are ticks, columns stages (devices along the mesh's `pipe`).

    The layers are cut into `num_stages * num_chunks` virtual stages. "round_robin" puts them on the stages
    round and round; "v_shape", for two chunks, there and back, so that the first stage also has the last.
    """

    name: str
    table: tuple[tuple[Entry, ...], ...]
    num_microbatches: int
    num_chunks: int = 1
    placement: ChunkPlacement = "round_robin"
    overlap: bool = False
    """Whether a forward and a backward of one tick go through their layers together."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.table[0])

    @property
    def num_ticks(self) -> int:
        """Ticks of a step."""
        return len(self.table)

    @property
    def num_virtual(self) -> int:
        """Virtual stages: cuts of the layers."""
        return self.num_stages * self.num_chunks

    @cached_property
    def split(self) -> bool:
        """Whether the backward is split into input gradients (`backward`) and weight gradients (`weight`)."""
        return any(entry.weight is not None for row in self.table for entry in row)

    def virtual(self, stage: int, chunk: int) -> int:
        """The virtual stage that is this chunk of this stage."""
        if self.placement == "v_shape" and chunk == 1:
            return 2 * self.num_stages - 1 - stage
        return chunk * self.num_stages + stage

    def place(self, virtual: int) -> tuple[int, int]:
        """The stage and the chunk where a virtual stage lies."""
        return place(virtual, self.num_stages, self.placement)


def place(virtual: int, num_stages: int, placement: ChunkPlacement) -> tuple[int, int]:
    """The stage and the chunk where a virtual stage lies."""
    chunk, stage = divmod(virtual, num_stages)
    return (num_stages - 1 - stage if placement == "v_shape" and chunk == 1 else stage), chunk


def one_stage(num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """Gradient accumulation: one stage that runs one microbatch after the other forward and backward.

    With one chunk in one tick; with more, chunk after chunk there and back, the last one's both in one tick.
    """
    if num_microbatches < 1:
        raise UserError(f"a step needs at least one microbatch, not {num_microbatches}")
    last = num_chunks - 1
    table = []
    for index in range(num_microbatches):
        works = [Work(chunk, index) for chunk in range(num_chunks)]
        table += [(Entry(forward=work),) for work in works[:last]]
        table += [(Entry(forward=works[last], backward=works[last]),)]
        table += [(Entry(backward=work),) for work in works[:last][::-1]]
    return Schedule("one_stage", tuple(table), num_microbatches, num_chunks)


def check(schedule: Schedule) -> None:
    """Raises `UserError`, naming tick and stage, unless the table runs everything once and after what it needs.

    A forward needs the virtual stage before it, a backward the one after it, at an earlier tick, for that is when the
    message travels; a backward needs its own forward, and a weight gradient its backward, no later than its own tick.
    """
    _check_shape(schedule)
    ticks = {kind: _ticks(schedule, kind) for kind in ("forward", "backward", "weight")}
    kinds = ticks if schedule.split else ("forward", "backward")
    for kind in kinds:
        for index, tick in enumerate(ticks[kind]):
            if tick is None:
                virtual, microbatch = divmod(index, schedule.num_microbatches)
                stage, chunk = schedule.place(virtual)
                raise UserError(
                    f"{_label(schedule)}: stage {stage} has no {_name(kind, chunk, microbatch)} at any tick; add it"
                )
    _check_order(schedule, "forward", ticks["forward"], "forward", ticks["forward"], before=1)
    _check_order(schedule, "backward", ticks["backward"], "forward", ticks["forward"], before=0)
    _check_order(schedule, "backward", ticks["backward"], "backward", ticks["backward"], before=-1)
    if schedule.split:
        _check_order(schedule, "weight", ticks["weight"], "backward", ticks["backward"], before=0)


def _check_shape(schedule: Schedule) -> None:
    label = _label(schedule)
    if not schedule.table or not schedule.table[0]:
        raise UserError(f"{label}: the table is empty; give at least one tick and one stage")
    if min(schedule.num_microbatches, schedule.num_chunks) < 1:
        sizes = f"{schedule.num_microbatches} microbatches and {schedule.num_chunks} chunks"
        raise UserError(f"{label}: {sizes}; both must be at least 1")
    if schedule.placement == "v_shape" and schedule.num_chunks != 2:
        have = f"2 chunks, not {schedule.num_chunks}"
        raise UserError(f"{label}: placement v_shape is for {have}; use placement round_robin")
    for tick, row in enumerate(schedule.table):
        if len(row) != schedule.num_stages:
            raise UserError(f"{label}: tick {tick} has {len(row)} stages, tick 0 has {schedule.num_stages}")


def _ticks(schedule: Schedule, kind: str) -> list[int | None]:
    """The tick of each (virtual, microbatch), flat, None where there is none; refuses doubles and wrong numbers."""
    count, num_chunks = schedule.num_microbatches, schedule.num_chunks
    found: list[int | None] = [None] * (schedule.num_virtual * count)
    starts = [
        [schedule.virtual(stage, chunk) * count for chunk in range(num_chunks)] for stage in range(schedule.num_stages)
    ]
    for tick, row in enumerate(schedule.table):
        for stage, entry in enumerate(row):
            work = getattr(entry, kind)
            if work is None:
                continue
            if not (0 <= work.chunk < num_chunks and 0 <= work.microbatch < count):
                have = f"{num_chunks} chunks and {count} microbatches"
                raise UserError(f"{_at(schedule, tick, stage)}: {_of(kind, work)} is out of range: there are {have}")
            index = starts[stage][work.chunk] + work.microbatch
            if found[index] is not None:
                raise UserError(
                    f"{_at(schedule, tick, stage)}: {_of(kind, work)} ran before, at tick {found[index]}; remove one"
                )
            found[index] = tick
    return found


def _check_order(
    schedule: Schedule, kind: str, ticks: list, needed_kind: str, needed: list, *, before: Literal[-1, 0, 1]
) -> None:
    """Each `kind` needs `needed_kind` of the virtual stage `before` it: of its own, at the same tick or earlier."""
    count = schedule.num_microbatches
    shift = before * count
    latest_gap = 0 if before == 0 else 1
    for index in range(max(0, shift), len(ticks) + min(0, shift)):
        if ticks[index] - needed[index - shift] < latest_gap:
            virtual, microbatch = divmod(index, count)
            stage, chunk = schedule.place(virtual)
            other_stage, other_chunk = schedule.place(virtual - before)
            need = f"{_name(needed_kind, other_chunk, microbatch)} of stage {other_stage}"
            when = "at the same tick or earlier" if before == 0 else "at an earlier tick"
            place = _at(schedule, ticks[index], stage)
            found = f"which is at tick {needed[index - shift]}"
            raise UserError(f"{place}: {_name(kind, chunk, microbatch)} needs {need} {when}, {found}")


def _label(schedule: Schedule) -> str:
    return f"schedule {schedule.name}"


def _at(schedule: Schedule, tick: int, stage: int) -> str:
    return f"{_label(schedule)}, tick {tick}, stage {stage}"


def _of(kind: str, work: Work) -> str:
    return _name(kind, work.chunk, work.microbatch)


def _name(kind: str, chunk: int, microbatch: int) -> str:
    """As in tables on file: F0.3 is the forward of chunk 0 and microbatch 3."""
    return f"{kind[0].upper()}{chunk}.{microbatch}"

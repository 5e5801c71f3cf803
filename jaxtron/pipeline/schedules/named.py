"""The schedules there are: each a function that makes the table for so many stages, microbatches and chunks."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxtron.config import UserError
from jaxtron.pipeline.schedules.ordering import make_table, schedule_in_order
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work, one_stage
from jaxtron.pipeline.schedules.sizes import check_sizes
from jaxtron.pipeline.schedules.table_file import read_csv
from jaxtron.pipeline.schedules.zero_bubble import dualpipe_v, zero_bubble, zero_bubble_v
from jaxtron.words import either

Generator = Callable[[int, int, int], Schedule]


def gpipe(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (1811.06965): 2(m + p - 1) ticks, m in flight."""
    check_sizes("gpipe", num_stages, num_microbatches, num_chunks)
    half = num_microbatches + num_stages - 1

    def ticks(stage: int, index: int) -> tuple[int, int]:
        return stage + index, half + num_stages - 1 - stage + index

    return _by_formula("gpipe", num_stages, num_microbatches, ticks)


def one_f_one_b(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """One forward, one backward in turns (2104.04473): 2(m + p - 1) ticks, p - s in flight on stage s."""
    check_sizes("1f1b", num_stages, num_microbatches, num_chunks)

    def ticks(stage: int, index: int) -> tuple[int, int]:
        return stage + 2 * index, 2 * num_stages - 1 - stage + 2 * index

    return _by_formula("1f1b", num_stages, num_microbatches, ticks)


def eager_1f1b(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """Forwards as early as they can be (2211.05322), paired with a backward in one tick once there are any.

    m + 2(p - 1) ticks, 2(p - 1 - s) + 1 in flight on stage s. In the steady state a message travels beside compute.
    """
    check_sizes("eager_1f1b", num_stages, num_microbatches, num_chunks)

    def ticks(stage: int, index: int) -> tuple[int, int]:
        return stage + index, 2 * (num_stages - 1) - stage + index

    return _by_formula("eager_1f1b", num_stages, num_microbatches, ticks)


def interleaved(num_stages: int, num_microbatches: int, num_chunks: int = 2, group: int | None = None) -> Schedule:
    """Megatron's interleaved 1F1B (2104.04473): 2(v m + p - 1) ticks if p divides m.

    `group` microbatches, p or more, pass one chunk before the next has its turn; None takes the fewest that fit.
    """
    check_sizes("interleaved", num_stages, num_microbatches, num_chunks, least_chunks=2, most_chunks=None)
    group = _group(num_stages, num_microbatches) if group is None else group
    rest = num_microbatches % group if group > 0 else 0
    if group < num_stages or (num_microbatches > group and 0 < rest < num_stages):
        sizes = f"{num_microbatches} microbatches in groups of {group} on {num_stages} stages"
        better = _group(num_stages, num_microbatches)
        raise UserError(f"interleaved: {sizes}: no group may have less than {num_stages}; use groups of {better}")
    forwards = chunk_order(num_microbatches, num_chunks, group)
    backwards = [Work(num_chunks - 1 - work.chunk, work.microbatch) for work in forwards]
    orders = []
    for stage in range(num_stages):
        warm_up = min(2 * (num_stages - 1 - stage) + (num_chunks - 1) * group, len(forwards))
        steps = [Entry(forward=work) for work in forwards[:warm_up]]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            steps += [Entry(forward=forward), Entry(backward=backward)]
        steps += [Entry(backward=work) for work in backwards[len(forwards) - warm_up :]]
        orders.append(steps)
    return schedule_in_order("interleaved", orders, num_microbatches, num_chunks=num_chunks)


def eager_interleaved(num_stages: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Interleaved with forwards as early as they can be, a forward and a backward in one tick.

    v m + (v + 1) p - 2 ticks if p divides m; otherwise the last group leaves holes.
    """
    check_sizes("eager_interleaved", num_stages, num_microbatches, num_chunks, least_chunks=2, most_chunks=None)
    # when microbatch and chunk have their turn, in groups of p microbatches
    starts = [index // num_stages * num_stages * num_chunks + index % num_stages for index in range(num_microbatches)]
    first_backward = num_stages * num_chunks - 1
    forwards: list[dict[int, Work]] = [{} for _ in range(num_stages)]
    backwards: list[dict[int, Work]] = [{} for _ in range(num_stages)]
    for stage in range(num_stages):
        for chunk in range(num_chunks):
            for index, start in enumerate(starts):
                work = Work(chunk, index)
                forwards[stage][stage + start + chunk * num_stages] = work
                back = first_backward + num_stages - 1 - stage + start + (num_chunks - 1 - chunk) * num_stages
                backwards[stage][back] = work
    return _merge("eager_interleaved", forwards, backwards, num_microbatches, num_chunks)


def chunk_order(num_microbatches: int, num_chunks: int, group: int) -> list[Work]:
    """Megatron's table of forwards: groups of microbatches, in each group chunk after chunk."""
    return [
        Work(chunk, index)
        for first in range(0, num_microbatches, group)
        for chunk in range(num_chunks)
        for index in range(first, min(first + group, num_microbatches))
    ]


def _group(num_stages: int, num_microbatches: int) -> int:
    """The least group of p or more that leaves no group, but perhaps an only one, with less than p."""
    rests = ((group, num_microbatches % group) for group in range(num_stages, num_microbatches))
    fitting = (group for group, rest in rests if rest == 0 or rest >= num_stages)
    return next(fitting, max(num_stages, num_microbatches))


SCHEDULES: dict[str, Generator] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "eager_1f1b": eager_1f1b,
    "interleaved": interleaved,
    "eager_interleaved": eager_interleaved,
    "zero_bubble": zero_bubble,
    "zero_bubble_v": zero_bubble_v,
    "dualpipe_v": dualpipe_v,
}


def make_schedule(
    name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1, num_stacks: int = 1
) -> Schedule:
    """The schedule of that name, or the one in that CSV file; on one stage always plain accumulation.

    `num_chunks` are a stage's chunks of each of a model's `num_stacks` stacks: the table has so many of all of them.
    Raises `UserError` for an unknown name, sizes the schedule does not run, or a table that is wrong or of other sizes.
    """
    if name.endswith(".csv"):
        return _custom(name, num_stages, num_microbatches, num_chunks * num_stacks)
    if name not in SCHEDULES:
        raise UserError(f"no schedule {name!r}: use one of {', '.join(SCHEDULES)}, or the path of a .csv table")
    if num_stages == 1:
        if num_chunks != 1:
            raise UserError(f"{num_chunks} chunks on one pipeline stage have no effect; use 1 chunk or more stages")
        return one_stage(num_microbatches, num_stacks)
    try:
        return _made(name, num_stages, num_microbatches, num_chunks * num_stacks)
    except UserError:
        if num_stacks == 1 or not _runs(name, num_stages, num_microbatches, num_chunks):
            raise
        whole = num_chunks * num_stacks
        others = [other for other in SCHEDULES if _runs(other, num_stages, num_microbatches, whole)]
        mend = f"use {either(others)}" if others else "use another number of stages or microbatches"
        raise UserError(
            f"the model's {num_stacks} stacks are {whole} chunks of a stage, too many for {name}; {mend}"
        ) from None


def _runs(name: str, num_stages: int, num_microbatches: int, num_chunks: int) -> bool:
    """Whether a schedule has a table for these sizes."""
    try:
        _made(name, num_stages, num_microbatches, num_chunks)
    except UserError:
        return False
    return True


@functools.lru_cache(maxsize=16)
def _made(name: str, num_stages: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Made once: a table of thousands of entries is asked for by every check of a configuration."""
    return SCHEDULES[name](num_stages, num_microbatches, num_chunks)


def _custom(path: str, num_stages: int, num_microbatches: int, num_chunks: int) -> Schedule:
    schedule = read_csv(Path(path))
    have = (schedule.num_stages, schedule.num_microbatches, schedule.num_chunks)
    if have != (num_stages, num_microbatches, num_chunks):
        sizes = [
            f"{stages} stages, {count} microbatches, {chunks} chunks"
            for stages, count, chunks in (have, (num_stages, num_microbatches, num_chunks))
        ]
        raise UserError(f"{path} is a table for {sizes[0]}, the run has {sizes[1]}; change one of them")
    return schedule


def _by_formula(
    name: str, num_stages: int, num_microbatches: int, ticks: Callable[[int, int], tuple[int, int]]
) -> Schedule:
    """A one-chunk table from (stage, microbatch) -> ticks of its forward and its backward."""
    works = [Work(0, index) for index in range(num_microbatches)]
    forwards, backwards = [], []
    for stage in range(num_stages):
        both = [ticks(stage, index) for index in range(num_microbatches)]
        forwards.append({forward: work for (forward, _), work in zip(both, works, strict=True)})
        backwards.append({backward: work for (_, backward), work in zip(both, works, strict=True)})
    return _merge(name, forwards, backwards, num_microbatches, 1)


def _merge(
    name: str,
    forwards: Iterable[dict[int, Work]],
    backwards: Iterable[dict[int, Work]],
    num_microbatches: int,
    num_chunks: int,
) -> Schedule:
    """The table that has at each tick of each stage what either has."""
    rows = [
        {tick: Entry(forward.get(tick), backward.get(tick)) for tick in forward.keys() | backward.keys()}
        for forward, backward in zip(forwards, backwards, strict=True)
    ]
    return Schedule(name, make_table(rows), num_microbatches, num_chunks)

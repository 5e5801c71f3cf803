"""Lowered tables, run in plain Python with names in place of arrays: whatever is read is what was meant."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest

from jaxtron.pipeline.lowering import Channel, LoweredSchedule, WorkTable, lower
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only
from jaxtron.pipeline.schedules.figures import figures
from jaxtron.pipeline.schedules.named import SCHEDULES, make_schedule
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work, check, one_stage
from jaxtron.pipeline.tick_loops import TickLoop, message_counts, tick_loops

TWO_CHUNKS = ("zero_bubble_v", "dualpipe_v")
MANY_CHUNKS = ("interleaved", "eager_interleaved")
NOTHING = "nothing"


class Broken(AssertionError):
    """A slot or a message that does not have what it should."""


class Buffer:
    """WorkTable of one stage; a content is awaited until it is taken, once. The last slot is for what nobody reads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: dict[int, tuple] = {}
        self.peak = 0

    def put(self, slot: int, content) -> None:
        if not 0 <= slot < self.size:
            raise Broken(f"{content} is put into slot {slot} of {self.size}")
        if slot in self.slots:
            raise Broken(f"{content} is put on top of {self.slots[slot]}")
        self.slots[slot] = content
        self.peak = max(self.peak, len(self.slots))

    def take(self, slot: int, wanted) -> None:
        if self.slots.pop(slot, NOTHING) != wanted:
            raise Broken(f"slot {slot} does not have {wanted}")


class Machine:
    """The stages of a lowered schedule. A content is (kind, virtual stage, microbatch), those of who is to use it."""

    def __init__(self, lowered: LoweredSchedule, stack_chunks: tuple[int, ...] = ()) -> None:
        self.lowered = lowered
        self.stack_chunks = stack_chunks or (lowered.schedule.num_chunks,)
        self.schedule = lowered.schedule
        self.stages = range(self.schedule.num_stages)
        sizes = (lowered.num_inputs, lowered.num_cotangents, *lowered.num_residuals, *lowered.num_deferred)
        self.buffers = [[Buffer(size) for _ in self.stages] for size in sizes]
        self.inputs, self.cotangents, *others = self.buffers
        # by stack
        self.residuals, self.deferred = others[: len(self.stack_chunks)], others[len(self.stack_chunks) :]
        self.sent: list = [NOTHING for _ in self.stages]
        self.ran = Counter()

    def run(self, loops: tuple[TickLoop, ...]) -> None:
        tick = 0
        for loop in loops:
            if loop.start != tick:
                raise Broken(f"a loop begins at tick {loop.start} after {tick}")
            iterations = -(-(loop.stop - loop.start) // loop.period)
            for number in range(iterations * loop.period):
                self.tick(loop.start + number if loop.start + number < loop.stop else None, loop, number % loop.period)
            tick = loop.stop
        if tick != self.schedule.num_ticks:
            raise Broken(f"{tick} ticks run of {self.schedule.num_ticks}")
        for buffer in itertools.chain(*self.buffers):
            if buffer.slots:
                raise Broken(f"nobody took {buffer.slots}")
        kinds = [kind for kind in ("forward", "backward", "weight") if getattr(self.lowered, kind).active.any()]
        every = itertools.product(kinds, range(self.schedule.num_virtual), range(self.schedule.num_microbatches))
        if self.ran != Counter(every):
            raise Broken("something did not run once")

    def tick(self, tick: int | None, loop: TickLoop, phase: int) -> None:
        """As the executor's; None is an idle tick that fills an iteration."""
        lowered = self.lowered
        messages = self.travel(lowered.cotangents, loop.cotangents[phase], self.sent)
        outputs = [self.forward(stage, row) for stage, row in self.rows(lowered.forward, tick)]
        self.receive(lowered.cotangents, messages, self.cotangents, tick)
        messages = self.travel(lowered.inputs, loop.inputs[phase], outputs)
        self.sent = [self.backward(stage, row) for stage, row in self.rows(lowered.backward, tick)]
        for stage, row in self.rows(lowered.weight, tick):
            self.weight(stage, row)
        self.receive(lowered.inputs, messages, self.inputs, tick)

    def rows(self, table: WorkTable, tick: int | None) -> Iterator[tuple[int, dict[str, int] | None]]:
        for stage in self.stages:
            has_work = tick is not None and table.active[tick, stage]
            names = [field.name for field in fields(WorkTable)]
            yield stage, {name: int(getattr(table, name)[tick, stage]) for name in names} if has_work else None

    def travel(self, channels: tuple[Channel, ...], pairs, contents: list) -> list:
        """What arrives at each stage on each channel; all that is sent must have an open way."""
        arrived = []
        for channel, open_routes in zip(channels, pairs, strict=True):
            if channel.routes:
                destinations = [destination for _, destination in open_routes]
                if len(set(destinations)) < len(destinations) or not set(open_routes) <= set(channel.routes):
                    raise Broken(f"{open_routes} is no permutation")
                sources = {destination: source for source, destination in open_routes}
            else:
                sources = {stage: stage for stage in self.stages}
            arrived.append([contents[sources[stage]] if stage in sources else NOTHING for stage in self.stages])
        return arrived

    def receive(self, channels: tuple[Channel, ...], messages: list, buffers: list[Buffer], tick: int | None) -> None:
        # every channel carries what a stage sends, but it is kept from one, and elsewhere the slot is spare
        for channel, arrived in zip(channels, messages, strict=True):
            for stage, content in enumerate(arrived):
                slot = buffers[stage].size if tick is None else int(channel.slots[tick, stage])
                if slot != buffers[stage].size:
                    if content == NOTHING:
                        raise Broken(f"nothing arrives at stage {stage} for slot {slot}")
                    buffers[stage].put(slot, content)

    def begin(self, kind: str, stage: int, row: dict[str, int]) -> tuple[int, int]:
        virtual = self.schedule.virtual(stage, row["chunk"])
        if (row["enters"], row["is_last"]) != (self.enters(virtual), virtual == self.schedule.num_virtual - 1):
            raise Broken(f"virtual stage {virtual} begins stack {row['enters']} or is last {row['is_last']}")
        self.ran[kind, virtual, row["microbatch"]] += 1
        return virtual, row["microbatch"]

    def stack(self, virtual: int) -> int:
        firsts = [self.schedule.num_stages * first for first in itertools.accumulate(self.stack_chunks)]
        return sum(virtual >= first for first in firsts)

    def enters(self, virtual: int) -> int:
        is_first = virtual == 0 or self.stack(virtual) > self.stack(virtual - 1)
        return self.stack(virtual) if is_first else -1

    def forward(self, stage: int, row: dict[str, int] | None):
        if row is None:
            return NOTHING
        virtual, microbatch = self.begin("forward", stage, row)
        trains = any(self.lowered.num_residuals)
        # a later stack's backward reads once more what entered it
        if virtual and not (trains and row["enters"] > 0):
            self.inputs[stage].take(row["input"], ("input", virtual, microbatch))
        elif virtual and self.inputs[stage].slots.get(row["input"]) != ("input", virtual, microbatch):
            raise Broken(f"slot {row['activation']} does not have what enters virtual stage {virtual}")
        if trains:
            self.residuals[self.stack(virtual)][stage].put(row["residual"], ("residual", virtual, microbatch))
            if row["is_last"]:
                self.cotangents[stage].put(row["cotangent"], ("cotangent", virtual, microbatch))
        return NOTHING if row["is_last"] else ("input", virtual + 1, microbatch)

    def backward(self, stage: int, row: dict[str, int] | None):
        if row is None:
            return NOTHING
        virtual, microbatch = self.begin("backward", stage, row)
        self.cotangents[stage].take(row["cotangent"], ("cotangent", virtual, microbatch))
        if row["enters"] > 0:
            self.inputs[stage].take(row["input"], ("input", virtual, microbatch))
        self.residuals[self.stack(virtual)][stage].take(row["residual"], ("residual", virtual, microbatch))
        if any(self.lowered.num_deferred):
            self.deferred[self.stack(virtual)][stage].put(row["deferred"], ("deferred", virtual, microbatch))
        return NOTHING if row["enters"] == 0 else ("cotangent", virtual - 1, microbatch)

    def weight(self, stage: int, row: dict[str, int] | None) -> None:
        if row is not None:
            virtual, microbatch = self.begin("weight", stage, row)
            self.deferred[self.stack(virtual)][stage].take(row["deferred"], ("deferred", virtual, microbatch))


def simulate(lowered: LoweredSchedule, stack_chunks: tuple[int, ...] = ()) -> Machine:
    """The machine after all ticks; `Broken` where anything is not what was meant."""
    machine = Machine(lowered, stack_chunks)
    machine.run(tick_loops(lowered))
    return machine


def tables(name: str) -> Iterator[Schedule]:
    chunks = (2, 3) if name in MANY_CHUNKS else (2,) if name in TWO_CHUNKS else (1,)
    for num_stages, num_microbatches, num_chunks in itertools.product((2, 3, 4, 5, 8), (1, 2, 3, 5, 8, 12, 17), chunks):
        if name == "dualpipe_v" and num_microbatches < 2 * num_stages:
            continue
        yield make_schedule(name, num_stages, num_microbatches, num_chunks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_everything_reads_what_it_needs_from_buffers_no_larger_than_that(name):
    for schedule in tables(name):
        lowered = lower(schedule)
        machine = simulate(lowered)
        stages = figures(schedule).stages
        assert lowered.num_residuals == (max(stage.in_flight for stage in stages),)
        assert lowered.num_deferred == (max(stage.deferred for stage in stages),)
        peaks = [max(buffer.peak for buffer in buffers) for buffers in machine.buffers]
        sizes = [lowered.num_inputs, lowered.num_cotangents, *lowered.num_residuals, *lowered.num_deferred]
        assert sizes == peaks


@pytest.mark.parametrize("name", MANY_CHUNKS + TWO_CHUNKS)
def test_stacks_have_buffers_of_their_own(name):
    for num_stages, num_microbatches, stack_chunks in itertools.product((2, 3, 4), (8, 9), ((1, 1), (2, 1), (1, 2, 1))):
        if name in TWO_CHUNKS and sum(stack_chunks) > 2:
            continue
        schedule = make_schedule(name, num_stages, num_microbatches, sum(stack_chunks))
        lowered = lower(schedule, stack_chunks)
        machine = simulate(lowered, stack_chunks)
        peaks = [max(buffer.peak for buffer in buffers) for buffers in machine.buffers]
        sizes = [lowered.num_inputs, lowered.num_cotangents, *lowered.num_residuals, *lowered.num_deferred]
        assert sizes == peaks and len(lowered.num_residuals) == len(stack_chunks)
    with pytest.raises(Broken):
        simulate(lowered)


def test_several_stacks_on_one_stage_keep_one_microbatch():
    for num_stacks, count in itertools.product((2, 3), (1, 2, 9)):
        schedule = one_stage(count, num_stacks)
        check(schedule)
        lowered = lower(schedule, (1,) * num_stacks)
        simulate(lowered, (1,) * num_stacks)
        assert lowered.num_residuals == (1,) * num_stacks
        # of many microbatches all but the first and the last are iterations of one loop
        longest = max(tick_loops(lowered), key=lambda loop: loop.stop - loop.start)
        assert count < 9 or (longest.stop - longest.start) // longest.period >= count - 2
        assert longest.period in (1, 2 * num_stacks - 1)
        assert message_counts(lowered) == (0, 0)


def test_accumulation_sends_nothing_and_keeps_one_of_each():
    for count in (1, 2, 7):
        lowered = lower(one_stage(count))
        simulate(lowered)
        assert lowered.inputs == lowered.cotangents == ()
        assert (lowered.num_inputs, lowered.num_cotangents, lowered.num_residuals) == (0, 1, (1,))


@pytest.mark.parametrize("placement", ["round_robin", "v_shape"])
def test_evaluation(placement):
    for num_stages in (1, 2, 3, 8):
        lowered = lower(forward_only(StagePlan((Partition((1,) * (2 * num_stages), num_stages, placement),))))
        simulate(lowered)
        assert (lowered.num_inputs, lowered.num_residuals, lowered.num_cotangents) == (1, (0,), 0)
        for count in (2, 9):
            lowered = lower(
                forward_only(StagePlan((Partition((1,) * (2 * num_stages), num_stages, placement),)), count)
            )
            simulate(lowered)
            # inputs wait on a stage while another of its chunks runs, not for every microbatch
            assert lowered.num_inputs <= num_stages and lowered.num_cotangents == 0 == lowered.num_residuals[0]


def test_a_table_of_ones_own():
    # idle ticks, microbatches out of order, activations and gradients that wait
    def entry(forward=None, backward=None, weight=None) -> Entry:
        return Entry(*(None if index is None else Work(0, index) for index in (forward, backward, weight)))

    table = (
        (entry(1), entry()),
        (entry(0), entry()),
        (entry(), entry()),
        (entry(), entry(0, 0)),
        (entry(), entry(1, 1)),
        (entry(), entry()),
        (entry(None, 1), entry(None, None, 1)),
        (entry(None, 0, 1), entry(None, None, 0)),
        (entry(None, None, 0), entry()),
    )
    lowered = lower(Schedule("mine", table, 2))
    simulate(lowered)
    sizes = (lowered.num_inputs, lowered.num_cotangents, *lowered.num_residuals, *lowered.num_deferred)
    assert sizes == (2, 2, 2, 2)


# tables and what is read in them
READ = [
    ("forward", ("microbatch", "chunk", "enters", "is_last", "input", "cotangent", "residual")),
    ("backward", ("microbatch", "chunk", "enters", "is_last", "cotangent", "residual", "deferred")),
    ("weight", ("microbatch", "chunk", "deferred")),
]


def is_read(schedule: Schedule, table: WorkTable, kind: str, name: str, place: tuple[int, int]) -> bool:
    if name == "input":
        return table.enters[place] < 0
    return name != "cotangent" or kind == "backward" or bool(table.is_last[place])


@pytest.mark.parametrize("name", ["1f1b", "eager_interleaved", "zero_bubble_v"])
def test_the_simulator_notices_every_wrong_number(name):
    schedule = make_schedule(name, 3, 4, 1 if name == "1f1b" else 2)
    lowered = lower(schedule)
    count = 0
    for kind, names in READ:
        table = getattr(lowered, kind)
        for field, place in itertools.product(names, zip(*np.nonzero(table.active), strict=True)):
            if (field == "deferred" and not any(lowered.num_deferred)) or not is_read(
                schedule, table, kind, field, place
            ):
                continue
            if field == "chunk" and schedule.num_chunks == 1:
                continue
            changed = getattr(table, field).copy()
            limit = {"microbatch": 4, "chunk": schedule.num_chunks, "is_last": 2}.get(field, 100)
            changed[place] = (changed[place] + 1) % limit
            with pytest.raises(Broken):
                simulate(replace(lowered, **{kind: replace(table, **{field: changed})}))
            count += 1
    assert count > 100


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zero_bubble_v"])
def test_the_simulator_notices_every_wrong_message(name):
    schedule = make_schedule(name, 3, 4, 1 if name == "1f1b" else 2)
    lowered = lower(schedule)
    for kind, spare in (("inputs", lowered.num_inputs), ("cotangents", lowered.num_cotangents)):
        channels = getattr(lowered, kind)
        for number, channel in enumerate(channels):
            for place in zip(*np.nonzero(channel.slots != spare), strict=True):
                for slot in {spare, (channel.slots[place] + 1) % spare} - {channel.slots[place]}:
                    changed = channel.slots.copy()
                    changed[place] = slot
                    others = [*channels[:number], replace(channel, slots=changed), *channels[number + 1 :]]
                    with pytest.raises(Broken):
                        simulate(replace(lowered, **{kind: tuple(others)}))


def test_the_simulator_notices_a_closed_way_and_a_buffer_too_small():
    lowered = lower(make_schedule("eager_1f1b", 3, 6))
    loops = tick_loops(lowered)
    for number, loop in enumerate(loops):
        for kind in ("inputs", "cotangents"):
            phases = getattr(loop, kind)
            for phase, channel in itertools.product(range(loop.period), range(len(getattr(lowered, kind)))):
                pairs = phases[phase][channel]
                for missing in pairs:
                    fewer = tuple(pair for pair in pairs if pair != missing)
                    row = (*phases[phase][:channel], fewer, *phases[phase][channel + 1 :])
                    changed = dataclasses.replace(loop, **{kind: (*phases[:phase], row, *phases[phase + 1 :])})
                    with pytest.raises(Broken):
                        Machine(lowered).run((*loops[:number], changed, *loops[number + 1 :]))
    fewer = {name: getattr(lowered, name) - 1 for name in ("num_inputs", "num_cotangents")}
    for name, count in {**fewer, "num_residuals": (lowered.num_residuals[0] - 1,)}.items():
        with pytest.raises(Broken):
            simulate(replace(lowered, **{name: count}))
    with pytest.raises(Broken):
        Machine(lowered).run(loops[:-1])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([*itertools.product((2, 4, 8), (2, 4)), (8, 8)], id="up to 8 stages"),
        pytest.param([(64, 8)], id="64 stages", marks=pytest.mark.slow),
    ],
)
def test_messages_sent_over_needed(name, sizes):
    for num_stages, rounds in sizes:
        chunks = 2 if name in MANY_CHUNKS + TWO_CHUNKS else 1
        schedule = make_schedule(name, num_stages, rounds * num_stages, chunks)
        sent = sum(loop.num_sent for loop in tick_loops(lower(schedule)))
        assert 1 <= sent / figures(schedule).num_messages <= 2

"""What makes a table valid, and the error that names the tick and the stage where it is not."""

from dataclasses import replace

import pytest

from jaxtron.config import UserError
from jaxtron.pipeline.schedules.named import one_f_one_b, zero_bubble, zero_bubble_v
from jaxtron.pipeline.schedules.schedule import IDLE, Entry, Schedule, Work, check, one_stage


def changed(schedule: Schedule, tick: int, stage: int, **slots) -> Schedule:
    """The schedule with another entry there."""
    rows = [list(row) for row in schedule.table]
    rows[tick][stage] = replace(rows[tick][stage], **slots)
    return replace(schedule, table=tuple(map(tuple, rows)))


@pytest.mark.parametrize("num_microbatches", [1, 2, 7])
def test_one_stage_runs_each_microbatch_once_in_order(num_microbatches):
    schedule = one_stage(num_microbatches)
    check(schedule)
    assert (schedule.num_stages, schedule.num_ticks, schedule.split) == (1, num_microbatches, False)
    works = [Work(0, index) for index in range(num_microbatches)]
    assert schedule.table == tuple((Entry(forward=work, backward=work),) for work in works)


@pytest.mark.parametrize("num_microbatches", [0, -1])
def test_a_step_needs_a_microbatch(num_microbatches):
    with pytest.raises(UserError, match=f"at least one microbatch, not {num_microbatches}"):
        one_stage(num_microbatches)


def test_a_schedule_is_data():
    assert one_stage(3) == one_stage(3) != one_stage(2)
    assert len({one_stage(3), one_stage(3)}) == 1


def test_chunks_lie_round_and_round_or_there_and_back():
    loop = Schedule("round_robin", ((IDLE,) * 3,), 1, 3)
    assert [loop.place(virtual) for virtual in range(9)] == [(s, c) for c in range(3) for s in range(3)]
    vee = Schedule("v_shape", ((IDLE,) * 3,), 1, 2, "v_shape")
    assert [vee.place(virtual) for virtual in range(6)] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    for schedule in (loop, vee):
        for virtual in range(schedule.num_virtual):
            assert schedule.virtual(*schedule.place(virtual)) == virtual


# 1f1b of 2 stages and 3 microbatches:
#   tick     0  1  2  3  4  5  6  7
#   stage 0  F0 .  F1 B0 F2 B1 .  B2
#   stage 1  .  F0 B0 F1 B1 F2 B2 .
@pytest.mark.parametrize(
    "tick, stage, slots, message",
    [
        (0, 0, {"forward": None}, "stage 0 has no F0.0 at any tick"),
        (7, 0, {"backward": None}, "stage 0 has no B0.2 at any tick"),
        (6, 0, {"forward": Work(0, 1)}, r"tick 6, stage 0: F0.1 ran before, at tick 2"),
        (
            6,
            0,
            {"forward": Work(0, 3)},
            r"tick 6, stage 0: F0.3 is out of range: there are 1 chunks and 3 microbatches",
        ),
        (6, 0, {"backward": Work(1, 0)}, r"tick 6, stage 0: B1.0 is out of range"),
        (6, 0, {"weight": Work(0, 0)}, r"stage 0 has no W0.1 at any tick"),
    ],
)
def test_every_work_is_there_once(tick, stage, slots, message):
    with pytest.raises(UserError, match=message):
        check(changed(one_f_one_b(2, 3), tick, stage, **slots))


def test_a_forward_needs_the_stage_before_it_at_an_earlier_tick():
    early = changed(changed(one_f_one_b(2, 3), 1, 1, forward=None), 0, 1, forward=Work(0, 0))
    message = "tick 0, stage 1: F0.0 needs F0.0 of stage 0 at an earlier tick, which is at tick 0"
    with pytest.raises(UserError, match=message):
        check(early)


def test_a_backward_needs_the_stage_after_it_at_an_earlier_tick():
    early = changed(changed(one_f_one_b(2, 3), 3, 0, backward=None), 2, 0, backward=Work(0, 0))
    message = "tick 2, stage 0: B0.0 needs B0.0 of stage 1 at an earlier tick, which is at tick 2"
    with pytest.raises(UserError, match=message):
        check(early)


def test_a_backward_may_share_the_tick_of_its_forward_but_not_precede_it():
    table = one_f_one_b(2, 1)
    check(changed(changed(table, 2, 1, backward=None), 1, 1, backward=Work(0, 0)))
    message = "tick 0, stage 1: B0.0 needs F0.0 of stage 1 at the same tick or earlier, which is at tick 1"
    with pytest.raises(UserError, match=message):
        check(changed(changed(table, 2, 1, backward=None), 0, 1, backward=Work(0, 0)))


def test_weights_come_no_earlier_than_their_backward():
    check(Schedule("whole", ((Entry(*[Work(0, 0)] * 3),),), 1))
    table = zero_bubble(2, 2)
    last = max(tick for tick, row in enumerate(table.table) if row[1].weight == Work(0, 1))
    message = "tick 0, stage 1: W0.1 needs B0.1 of stage 1 at the same tick or earlier"
    with pytest.raises(UserError, match=message):
        check(changed(changed(table, last, 1, weight=None), 0, 1, weight=Work(0, 1)))


@pytest.mark.parametrize(
    "schedule, message",
    [
        (Schedule("none", (), 1), "the table is empty"),
        (Schedule("ragged", ((IDLE, IDLE), (IDLE,)), 1), "tick 1 has 1 stages, tick 0 has 2"),
        (Schedule("nothing", ((IDLE,),), 0), "0 microbatches and 1 chunks"),
        (Schedule("bent", ((IDLE,),), 1, 3, "v_shape"), "placement v_shape is for 2 chunks, not 3"),
    ],
)
def test_a_table_has_a_shape(schedule, message):
    with pytest.raises(UserError, match=message):
        check(schedule)


def test_vee_and_loop_are_not_the_same_table():
    with pytest.raises(UserError, match="needs F"):
        check(replace(zero_bubble_v(2, 3), placement="round_robin"))

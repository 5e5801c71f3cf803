"""Tables of pipeline schedules, without a device."""

import pytest

from jaxtron.pipeline.schedule import Entry, one_stage


@pytest.mark.parametrize("num_microbatches", [1, 2, 7])
def test_one_stage_runs_each_microbatch_once_in_order(num_microbatches):
    schedule = one_stage(num_microbatches)
    assert (schedule.num_stages, schedule.num_ticks) == (1, num_microbatches)
    assert schedule.table == tuple((Entry("forward_backward", index),) for index in range(num_microbatches))


@pytest.mark.parametrize("num_microbatches", [0, -1])
def test_a_step_needs_a_microbatch(num_microbatches):
    with pytest.raises(ValueError, match=f"at least one microbatch, not {num_microbatches}"):
        one_stage(num_microbatches)


def test_a_schedule_is_data():
    assert one_stage(3) == one_stage(3) != one_stage(2)
    assert len({one_stage(3), one_stage(3)}) == 1

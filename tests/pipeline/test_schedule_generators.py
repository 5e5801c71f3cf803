"""Every schedule over many sizes: valid, as short as its theory, with as much in flight as its paper says."""

import itertools
import time

import pytest

from jaxtron.config import UserError
from jaxtron.pipeline.schedules.figures import figures
from jaxtron.pipeline.schedules.named import (
    SCHEDULES,
    chunk_order,
    dualpipe_v,
    eager_1f1b,
    eager_interleaved,
    gpipe,
    interleaved,
    make_schedule,
    one_f_one_b,
    zero_bubble,
    zero_bubble_v,
)
from jaxtron.pipeline.schedules.schedule import Work, check, one_stage

STAGES = (1, 2, 3, 4, 5, 8)
MICROBATCHES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32)
SIZES = list(itertools.product(STAGES, MICROBATCHES))
TWO_CHUNKS = ("zero_bubble_v", "dualpipe_v")


def most(schedule, name):
    return [getattr(stage, name) for stage in figures(schedule).stages]


def test_gpipe():
    for p, m in SIZES:
        schedule = gpipe(p, m)
        check(schedule)
        assert schedule.num_ticks == 2 * (m + p - 1)
        assert figures(schedule).bubble == pytest.approx((p - 1) / m)
        assert most(schedule, "in_flight") == [m] * p


def test_one_forward_one_backward():
    for p, m in SIZES:
        schedule = one_f_one_b(p, m)
        check(schedule)
        found = figures(schedule)
        assert schedule.num_ticks == 2 * (m + p - 1)
        assert found.bubble == pytest.approx((p - 1) / m)
        assert found.tick_bubble == pytest.approx((p - 1) / m)
        assert most(schedule, "in_flight") == [min(m, p - stage) for stage in range(p)]
        # Megatron's count of warm-up forwards: pp - rank - 1
        assert most(schedule, "warm_up") == [min(m - 1, p - stage - 1) for stage in range(p)]


def test_eager_pairs():
    for p, m in SIZES:
        schedule = eager_1f1b(p, m)
        check(schedule)
        found = figures(schedule)
        assert schedule.num_ticks == m + 2 * (p - 1)
        # pairing needs no ticks of equal length: even a clock common to all stages costs nothing once m >= 2p
        assert found.bubble == pytest.approx((p - 1) / m)
        assert m < 2 * p - 1 or found.lockstep_bubble == pytest.approx((p - 1) / m)
        assert most(schedule, "in_flight") == [min(m, 2 * (p - 1 - stage) + 1) for stage in range(p)]


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
def test_interleaved_and_its_eager_form(num_chunks):
    for p, m in SIZES:
        schedule, eager = interleaved(p, m, num_chunks), eager_interleaved(p, m, num_chunks)
        check(schedule)
        check(eager)
        if m % p:
            continue
        ideal = (p - 1) / (num_chunks * m)
        assert schedule.num_ticks == 2 * (num_chunks * m + p - 1)
        assert figures(schedule).bubble == pytest.approx(ideal)
        assert eager.num_ticks == num_chunks * m + (num_chunks + 1) * p - 2
        assert figures(eager).bubble == pytest.approx(ideal)
        # Megatron: 2(pp - rank - 1) + (chunks - 1) * group, capped by all there are
        warm_up = [2 * (p - stage - 1) + (num_chunks - 1) * p for stage in range(p)]
        for table in (schedule, eager):
            assert most(table, "warm_up") == [min(count, num_chunks * m - 1) for count in warm_up]
            assert most(table, "in_flight") == [min(count + 1, num_chunks * m) for count in warm_up]


def test_megatrons_order_of_chunks():
    # from the comment on get_schedule_table in Megatron-Core's schedules.py: 5 microbatches, 2 chunks, groups of 3
    expected = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (3, 1), (4, 1)]
    assert chunk_order(5, 2, 3) == [Work(chunk, microbatch) for microbatch, chunk in expected]
    schedule = interleaved(2, 5, 2, group=3)
    check(schedule)
    for stage in range(2):
        column = [row[stage].forward for row in schedule.table]
        assert [work for work in column if work] == chunk_order(5, 2, 3)


@pytest.mark.parametrize("num_chunks", [2, 3])
def test_any_group_that_leaves_none_too_small(num_chunks):
    for p, m in SIZES:
        for group in range(p, 2 * p + 2):
            if m > group and 0 < m % group < p:
                with pytest.raises(UserError, match=rf"no group may have less than {p}; use groups of \d+"):
                    interleaved(p, m, num_chunks, group)
            else:
                check(interleaved(p, m, num_chunks, group))
    with pytest.raises(UserError, match="no group may have less than 4"):
        interleaved(4, 8, num_chunks, group=3)
    with pytest.raises(UserError, match="groups of 0"):
        interleaved(4, 8, num_chunks, group=0)


def test_zero_bubble_h1():
    for p, m in SIZES:
        schedule = zero_bubble(p, m)
        check(schedule)
        assert schedule.num_ticks == (3 * m + p - 1 if m >= p else 2 * (m + p) - 1)
        # 1F1B's residuals, and never more than 1F1B's first stage when deferred ones count as much
        assert all(count <= p - stage for stage, count in enumerate(most(schedule, "in_flight")))
        assert all(count <= p for count in most(schedule, "held"))
        if m >= p:
            assert figures(schedule).bubble == pytest.approx((p - 1) / (3 * m))


def test_zero_bubble_v():
    for p, m in SIZES:
        schedule = zero_bubble_v(p, m)
        check(schedule)
        assert schedule.num_ticks == max(6 * m + p - 1, 4 * (m + p) - 2)
        assert all(count <= 2 * p for count in most(schedule, "held"))
        if m >= 2 * p - 1:
            found = figures(schedule)
            assert found.bubble == pytest.approx((p - 1) / (6 * m))
            assert most(schedule, "held") == [2 * p] * p


def test_dualpipe_v():
    for p, m in SIZES:
        if m < 2 * p:
            with pytest.raises(UserError, match=f"needs at least {2 * p} microbatches, not {m}; use more"):
                dualpipe_v(p, m)
            continue
        schedule = dualpipe_v(p, m)
        check(schedule)
        assert schedule.num_ticks == 2 * m + 5 * p - 2
        assert most(schedule, "held") == [2 * p + 1] * p
        assert figures(schedule).bubble <= (p - 1) / (3 * m) + 1e-9


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_splitting_the_backward_pays(num_stages):
    m = 4 * num_stages
    plain = figures(one_f_one_b(num_stages, m)).bubble
    assert figures(zero_bubble(num_stages, m)).bubble == pytest.approx(plain / 3)
    assert figures(zero_bubble_v(num_stages, m)).bubble == pytest.approx(plain / 6)


def test_one_slot_a_tick_unless_paired():
    for name in ("gpipe", "1f1b", "interleaved", "zero_bubble", "zero_bubble_v"):
        schedule = make_schedule(name, 4, 8, 2 if name in ("interleaved", *TWO_CHUNKS) else 1)
        for row in schedule.table:
            for entry in row:
                assert sum(slot is not None for slot in (entry.forward, entry.backward, entry.weight)) <= 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_on_one_stage_every_schedule_is_accumulation(name):
    assert make_schedule(name, 1, 5) == one_stage(5)
    with pytest.raises(UserError, match="2 chunks on one pipeline stage have no effect"):
        make_schedule(name, 1, 5, 2)


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("2f2b", (2, 4, 1), "no schedule '2f2b': use one of gpipe, 1f1b, .*csv"),
        ("1f1b", (2, 4, 2), "1f1b has 1 chunk a stage, not 2; for more chunks use interleaved"),
        ("1f1b", (2, 4, 0), "1f1b has 1 chunk a stage, not 0"),
        ("gpipe", (2, 0, 1), "at least one microbatch, not 0"),
        ("gpipe", (0, 4, 1), "gpipe needs at least 1 pipeline stages, not 0"),
        ("interleaved", (2, 4, 1), "interleaved needs at least 2 chunks a stage, not 1"),
        ("eager_interleaved", (2, 4, 1), "eager_interleaved needs at least 2 chunks a stage, not 1"),
        ("zero_bubble", (2, 4, 2), "zero_bubble has 1 chunk a stage, not 2"),
        ("zero_bubble_v", (2, 4, 3), "zero_bubble_v has 2 chunks a stage, not 3"),
        ("dualpipe_v", (2, 4, 1), "dualpipe_v has 2 chunks a stage, not 1"),
        ("dualpipe_v", (4, 4, 2), "at least 8 microbatches, not 4; use more, or zero_bubble_v"),
    ],
)
def test_sizes_a_schedule_does_not_run(name, sizes, message):
    with pytest.raises(UserError, match=message):
        make_schedule(name, *sizes)


# a ratio of times, still: on a machine with other work to do it may be anything
@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_largest_tables_are_made_as_fast_as_small_ones_for_their_size(name):
    chunks = 2 if name in ("interleaved", "eager_interleaved", *TWO_CHUNKS) else 1

    def seconds_per_entry(num_stages, num_microbatches):
        start = time.perf_counter()
        schedule = SCHEDULES[name](num_stages, num_microbatches, chunks)
        return (time.perf_counter() - start) / (schedule.num_ticks * schedule.num_stages)

    small = min(seconds_per_entry(16, 128) for _ in range(3))
    assert seconds_per_entry(64, 512) < 8 * small

"""What a table costs."""

import pytest

from jaxtron.pipeline.schedules.figures import Boundary, figures, flight, messages, timeline
from jaxtron.pipeline.schedules.named import eager_1f1b, gpipe, interleaved, one_f_one_b, zero_bubble, zero_bubble_v
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work, one_stage


def test_one_stage_has_no_bubble_and_sends_nothing():
    found = figures(one_stage(4))
    assert (found.bubble, found.lockstep_bubble, found.tick_bubble, found.num_messages) == (0, 0, 0, 0)
    assert found.makespan == 12
    assert found.stages[0].in_flight == 1


def test_messages_are_one_a_microbatch_boundary_and_direction():
    expected = {
        Boundary(0, 1, "forward"): 5,
        Boundary(1, 0, "backward"): 5,
        Boundary(1, 2, "forward"): 5,
        Boundary(2, 1, "backward"): 5,
    }
    assert messages(one_f_one_b(3, 5)) == expected
    looped = messages(interleaved(3, 6, 2))
    # between the chunks activations go from the last stage round to the first
    assert looped[Boundary(2, 0, "forward")] == 6
    assert looped[Boundary(0, 1, "forward")] == 12
    # at the bottom of the vee the second chunk is on the same stage
    bent = messages(zero_bubble_v(3, 5))
    assert bent[Boundary(0, 1, "forward")] == bent[Boundary(1, 0, "forward")] == 5
    assert sum(bent.values()) == 5 * 2 * (6 - 2)


def test_in_flight_over_time():
    # tick  0  1  2  3  4  5  6  7
    #       F0 .  F1 B0 F2 B1 .  B2
    assert [tick.in_flight for tick in flight(one_f_one_b(2, 3), 0)] == [1, 1, 2, 2, 2, 2, 1, 1]
    # tick  0  1  2  3     4
    #       F0 F1 F2 .. with deferred ones a forward adds before a backward takes
    assert [tick.in_flight for tick in flight(eager_1f1b(2, 3), 0)] == [1, 2, 3, 2, 1]
    # a pair made and used in one tick is there meanwhile
    whole = Schedule("whole", ((Entry(*[Work(0, 0)] * 3),),), 1)
    assert [tuple(tick) for tick in flight(whole, 0)] == [(1, 1, 1)]


def test_pairs_wait_for_their_weight_gradients():
    found = figures(zero_bubble(4, 16)).stages
    assert [stage.in_flight for stage in found] == [4, 3, 2, 1]
    assert [stage.deferred for stage in found] == [1, 2, 3, 4]
    assert [stage.held for stage in found] == [4, 4, 4, 4]


def test_the_timeline_follows_its_inputs():
    for schedule in (gpipe(4, 6), one_f_one_b(4, 6), interleaved(3, 6, 2), eager_1f1b(3, 5), zero_bubble_v(3, 5)):
        ends = {}
        spans = timeline(schedule)
        for stage, stage_spans in enumerate(spans):
            assert all(one.end <= other.start for one, other in zip(stage_spans, stage_spans[1:], strict=False))
            for span in stage_spans:
                ends[span.slot, schedule.virtual(stage, span.work.chunk), span.work.microbatch] = span
        for (slot, virtual, microbatch), span in ends.items():
            before = ends.get((slot, virtual + (-1 if slot == "forward" else 1), microbatch))
            assert slot == "weight" or before is None or before.end <= span.start
            earlier = {"forward": None, "backward": "forward", "weight": "backward"}[slot]
            assert earlier is None or ends[earlier, virtual, microbatch].end <= span.start


def test_messages_take_time_where_nothing_hides_them():
    # the first forward's way down and the last backward's way up, at least
    for schedule in (gpipe(4, 8), one_f_one_b(4, 8), eager_1f1b(4, 8)):
        assert figures(schedule, latency=0.5).makespan >= figures(schedule).makespan + 2 * 3 * 0.5 - 1e-9
    # early forwards hide messages that 1F1B waits for in every round
    late = {
        name: figures(make(4, 32), latency=0.25).bubble for name, make in (("1f1b", one_f_one_b), ("eager", eager_1f1b))
    }
    assert late["eager"] < 0.8 * late["1f1b"]
    assert late["eager"] == pytest.approx(figures(eager_1f1b(4, 32)).bubble + 6 * 0.25 / 96)


def test_a_common_clock_costs_1f1b_but_not_pairs():
    # at every tick some stages run forwards and others backwards, twice as long
    assert figures(one_f_one_b(4, 64)).lockstep_bubble > 0.3
    assert figures(eager_1f1b(4, 64)).lockstep_bubble == pytest.approx(3 / 64)
    assert figures(zero_bubble_v(4, 64)).lockstep_bubble == pytest.approx(3 / (6 * 64))

"""Schedules that split the backward: input gradients at once, weight gradients where a stage would idle."""

from collections import deque

from jaxtron.config import UserError
from jaxtron.pipeline.schedules.ordering import make_table, schedule_in_order
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work
from jaxtron.pipeline.schedules.sizes import check_sizes


def zero_bubble(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """ZB-H1 (2401.10241): 1F1B whose weight gradients wait for gaps.

    One slot a tick: 3m + p - 1 ticks for m >= p, 2(m + p) - 1 below. On stage s p - s are in flight at most, p with
    the deferred weight gradients.
    """
    check_sizes("zero_bubble", num_stages, num_microbatches, num_chunks)
    works = [Work(0, index) for index in range(num_microbatches)]
    rows: list[dict[int, Entry]] = [{} for _ in range(num_stages)]
    forwards, backwards, weights = ([0] * num_stages for _ in range(3))
    tick = 0
    while min(weights) < num_microbatches:
        # what had arrived when the tick began
        sent_forwards, sent_backwards = list(forwards), list(backwards)
        for stage in range(num_stages):
            done, back, weighed = forwards[stage], backwards[stage], weights[stage]
            arrived = sent_forwards[stage - 1] if stage else num_microbatches
            returned = sent_backwards[stage + 1] if stage + 1 < num_stages else done
            room = done - back < num_stages - stage and done - weighed < num_stages
            if done < min(arrived, num_microbatches) and room:
                rows[stage][tick] = Entry(forward=works[done])
                forwards[stage] += 1
            elif back < min(returned, done):
                rows[stage][tick] = Entry(backward=works[back])
                backwards[stage] += 1
            elif weighed < back:
                rows[stage][tick] = Entry(weight=works[weighed])
                weights[stage] += 1
        tick += 1
    return Schedule("zero_bubble", make_table(rows), num_microbatches)


def zero_bubble_v(num_stages: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """ZB-V (2405.15362): the layers run down the stages and back up, so that the first stage has the loss too.

    One slot of half a stage a tick: the greater of 6m + p - 1 and 4(m + p) - 2 ticks, no stage idle between its first
    and its last from m = 2p - 1 on. At most 2p halves of a stage are in flight, deferred weight gradients included: as
    much as 1F1B's p.
    """
    check_sizes("zero_bubble_v", num_stages, num_microbatches, num_chunks, least_chunks=2, most_chunks=2)
    # with fewer microbatches the pipeline never fills: the same order without those that are not there
    count = max(num_microbatches, 2 * num_stages - 1)
    orders = []
    for stage in range(num_stages):
        later = num_stages - stage
        order = _Order()
        order.run(2 * later - 1, "F0")
        order.run(stage, "F1", "F0")
        order.run(later, "F1", "B1", "W")
        order.run(count - num_stages - later + 1, "F0", "B0", "W", "F1", "B1", "W")
        order.run(later - 1, "B0", "W", "F1", "B1", "W")
        # input gradients first, for others wait for them
        order.run(stage, "B0", "B1")
        order.run(later, "B0", "W")
        order.run(2 * stage, "W")
        orders.append([step for step in order.steps if _microbatch(step) < num_microbatches])
    return schedule_in_order("zero_bubble_v", orders, num_microbatches, num_chunks=2, placement="v_shape")


def dualpipe_v(num_stages: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """DualPipe-V (github.com/deepseek-ai/DualPipe): ZB-V's placement, a forward beside a backward of the other half.

    For m >= 2p, in 2m + 5p - 2 ticks. Whole backwards in the steady state, that is B and W in one tick; split ones on
    the way in and out. At most 2p + 1 halves of a stage are in flight, deferred weight gradients included.
    """
    check_sizes("dualpipe_v", num_stages, num_microbatches, num_chunks, least_chunks=2, most_chunks=2)
    if num_microbatches < 2 * num_stages:
        sizes = f"{num_stages} stages needs at least {2 * num_stages} microbatches, not {num_microbatches}"
        raise UserError(f"dualpipe_v on {sizes}; use more, or zero_bubble_v")
    orders = []
    for stage in range(num_stages):
        later = num_stages - 1 - stage
        order = _Order()
        order.run(2 * later, "F0")
        order.run(stage + 1, "F0", "F1")
        order.run(later, "B1", "W", "F1")
        order.run(num_microbatches - num_stages - later, "F0 B1 W", "F1 B0 W")
        order.run(later, "B1 W", "F1 B0 W")
        # of these backwards the later half leave their weight gradients for the end
        tail = ["B1", "B0"] * (stage + 1)
        for index, backward in enumerate(tail):
            order.run(1, backward if index > stage else f"{backward} W")
        order.run(later, "W", "B0")
        order.run(stage + 1, "W")
        orders.append(order.steps)
    return schedule_in_order("dualpipe_v", orders, num_microbatches, num_chunks=2, placement="v_shape")


class _Order:
    """What a stage with two chunks does in order; microbatches and weight gradients take their turn by themselves."""

    def __init__(self):
        self.steps: list[Entry] = []
        self._forwards, self._backwards = [0, 0], [0, 0]
        self._pairs: deque[Work] = deque()

    def run(self, times: int, *steps: str) -> None:
        """Adds the steps, so many times over: each a tick, such as "F0 B1 W", by slot and chunk."""
        slots = [(_chunk(step, "F"), _chunk(step, "B"), "W" in step) for step in steps]
        for _ in range(times):
            for forward, backward, weight in slots:
                self.steps.append(self._entry(forward, backward, weight))

    def _entry(self, forward: int | None, backward: int | None, weight: bool) -> Entry:
        forward_work = backward_work = None
        if forward is not None:
            forward_work = Work(forward, self._forwards[forward])
            self._forwards[forward] += 1
        if backward is not None:
            backward_work = Work(backward, self._backwards[backward])
            self._backwards[backward] += 1
            self._pairs.append(backward_work)
        return Entry(forward_work, backward_work, self._pairs.popleft() if weight else None)


def _chunk(step: str, slot: str) -> int | None:
    """The chunk of a slot in "F0 B1 W"; None if it is not in there."""
    return int(step[step.index(slot) + 1]) if slot in step else None


def _microbatch(step: Entry) -> int:
    work = step.forward or step.backward or step.weight
    assert work is not None
    return work.microbatch

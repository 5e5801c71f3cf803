"""The loops that run a lowered schedule's ticks: what is compiled once and run many times, and what it sends."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int32

from jaxtron.pipeline.lowering import Channel, LoweredSchedule, Routes
from jaxtron.pipeline.schedules.schedule import Schedule

# ticks in an iteration of a loop over them: schedules repeat themselves after one, two, three or six
PERIODS = (1, 2, 3, 6)
# loops end at so many ticks at most, so that long schedules are cut as fast as short ones
MOST_CUTS = 96
# messages sent over messages needed; a table that is too irregular for it sends more
MOST_SENT = 2
# a kind of work is worth compiling once more for a sixteenth of the messages, or less if the limit asks for it
WORKS_FOR_ALL_MESSAGES = (16, 256, 20)


@dataclass(frozen=True)
class TickLoop:
    """Ticks from `start` to before `stop` that run as one loop, `period` of them in an iteration.

    Who sends to whom must be known when the program is compiled, so each tick of an iteration has routes of its own:
    stages whose work alternates do not send empty messages in between.
    """

    start: int
    stop: int
    period: int
    inputs: tuple[tuple[Routes, ...], ...]
    """By tick of an iteration and channel."""
    cotangents: tuple[tuple[Routes, ...], ...]

    @property
    def num_iterations(self) -> int:
        """Iterations of the loop; the last may end in idle ticks."""
        return iterations(self.start, self.stop, self.period)

    @property
    def num_sent(self) -> int:
        """Messages sent, empty ones included."""
        phases = zip(self.inputs, self.cotangents, strict=True)
        return sum(sum(map(len, (*inputs, *cotangents))) for inputs, cotangents in phases) * self.num_iterations


def iterations(start: int, stop: int, period: int) -> int:
    """Iterations of `period` ticks that hold those from `start` to before `stop`."""
    return math.ceil((stop - start) / period)


def tick_loops(lowered: LoweredSchedule) -> tuple[TickLoop, ...]:
    """The loops that run the ticks: few messages for few ticks to compile, and at most `MOST_SENT` times the needed.

    What a stage's work costs to compile is priced in messages, cheaper until the limit is kept.
    """
    needed = _num_needed(lowered)
    for worth in np.geomspace(*WORKS_FOR_ALL_MESSAGES):
        cuts = _cheapest_cuts(lowered, max(1, needed) / worth)
        loops = tuple(_loop(lowered, start, stop, period) for start, stop, period in cuts)
        if sum(loop.num_sent for loop in loops) <= MOST_SENT * needed:
            break
    return loops


def message_counts(lowered: LoweredSchedule) -> tuple[int, int]:
    """Messages sent in a step, empty ones included, and messages needed."""
    return sum(loop.num_sent for loop in tick_loops(lowered)), _num_needed(lowered)


def reached(lowered: LoweredSchedule, kind: Literal["forward", "backward", "weight", "paired"]) -> int:
    """Ticks at which a stage comes by this kind of work in the compiled loops, whether it has any or not.

    Of a schedule that overlaps, forwards and backwards are those by themselves, and what runs together is `paired`."""
    kinds = ("forward", "backward", "weight")
    active = lowered.paired if kind == "paired" else lowered.alone[kinds.index(kind)].active
    return sum(
        loop.num_iterations
        for loop in tick_loops(lowered)
        for phase in range(loop.period)
        if active[loop.start + phase : loop.stop : loop.period].any()
    )


def _all_channels(lowered: LoweredSchedule) -> list[tuple[Channel, int]]:
    """Each with its buffer's spare slot."""
    inputs = [(channel, lowered.num_inputs) for channel in lowered.inputs]
    return inputs + [(channel, lowered.num_cotangents) for channel in lowered.cotangents]


def _num_needed(lowered: LoweredSchedule) -> int:
    return sum(int((channel.slots != spare).sum()) for channel, spare in _all_channels(lowered) if channel.routes)


def _cheapest_cuts(lowered: LoweredSchedule, price: float) -> list[tuple[int, int, int]]:
    """Cuts of the ticks into loops (start, stop, period) that cost least, by dynamic programming over where they end.

    A loop costs the messages it sends, and `price` for each kind of work that a tick of its iteration compiles:
    least(stop) = min over start, period of least(start) + cost(start, stop, period), least(0) = 0.
    """
    num_ticks = lowered.schedule.num_ticks
    periods = _periods(lowered.schedule)
    costs = {period: _LoopCosts(lowered, period, price) for period in periods}
    works = costs[PERIODS[0]].works
    ends = _ends(num_ticks, math.lcm(*periods), _first(works[:, 1]), num_ticks - _first(works[::-1, 0]))
    least, cuts = [0.0], [(0, 0)]
    for index, stop in enumerate(ends[1:].tolist(), 1):
        choices = []
        for period, of_period in costs.items():
            total = of_period.added(np.asarray(least), ends[:index], stop)
            if stop < num_ticks:
                # idle ticks at the end of an iteration would lose what the last tick sends
                total = np.where((stop - ends[:index]) % period, np.inf, total)
            best = int(total.argmin())
            choices.append((float(total[best]), best, period))
        cost, start, period = min(choices)
        least.append(cost)
        cuts.append((start, period))
    return _followed_back(cuts, ends.tolist())


def _followed_back(cuts: list[tuple[int, int]], ends: list[int]) -> list[tuple[int, int, int]]:
    """The loops (start, stop, period), from where each end's cheapest loop begins (an index of `ends`)."""
    loops, index = [], len(ends) - 1
    while index:
        start, period = cuts[index]
        loops.append((ends[start], ends[index], period))
        index = start
    return loops[::-1]


class _LoopCosts:
    """What loops of one period cost, from counts of what has happened before each tick."""

    def __init__(self, lowered: LoweredSchedule, period: int, price: float) -> None:
        tables = (lowered.forward, lowered.backward, lowered.weight)
        self.works: Bool[np.ndarray, "T 3"] = np.stack([table.active.any(1) for table in tables], 1)
        messages = [
            channel.slots[:, [destination for _, destination in channel.routes]] != spare
            for channel, spare in _all_channels(lowered)
        ]
        self._period = period
        self._price = price
        self._num_works = _counts(self.works, period)
        self._num_messages = _counts(np.concatenate([*messages, self.works[:, :0]], 1), period)

    def added(
        self, before: Float64[np.ndarray, "N"], starts: Int32[np.ndarray, "N"], stop: int
    ) -> Float64[np.ndarray, "N"]:
        """The cost of a loop from each of `starts` to before `stop`, added to what is paid `before` each."""
        # by start and event: the ticks of an iteration at which it happens in any iteration
        sent = (self._num_messages[stop] > self._num_messages[starts]).sum((1, 2))
        compiled = (self._num_works[stop] > self._num_works[starts]).sum((1, 2))
        count = -(-(stop - starts) // self._period)
        return before + sent * count + self._price * compiled


def _periods(schedule: Schedule) -> tuple[int, ...]:
    """Ticks that an iteration of a loop may have."""
    # on one stage a microbatch goes through its chunks there and back before the next begins
    return tuple({*PERIODS, 2 * schedule.num_chunks - 1}) if schedule.num_stages == 1 else PERIODS


def _ends(num_ticks: int, whole: int, first_backward: int, last_forward: int) -> Int32[np.ndarray, "ends"]:
    """Where loops may begin and end: every tick, or of many ticks some that lie whole periods (`whole`) apart."""
    step = 1 if num_ticks <= MOST_CUTS else whole * math.ceil(num_ticks / (MOST_CUTS * whole))
    ends = {tick for start in (0, first_backward, last_forward) for tick in range(start % step, num_ticks, step)}
    return np.array(sorted({0, *ends, num_ticks}), np.int32)


def _first(happens: Bool[np.ndarray, "T"]) -> int:
    return int(happens.argmax())


def _counts(events: Bool[np.ndarray, "T E"], period: int) -> Int32[np.ndarray, "T+1 period E"]:
    """How often each event has happened before a tick, by the tick's place in the period."""
    here = np.arange(len(events))[:, None] % period == np.arange(period)
    counts = (here[..., None] & events[:, None]).cumsum(0, dtype=np.int32)
    return np.concatenate([np.zeros_like(counts[:1]), counts])


def _loop(lowered: LoweredSchedule, start: int, stop: int, period: int) -> TickLoop:
    def needed(channels: tuple[Channel, ...], spare: int) -> tuple[tuple[Routes, ...], ...]:
        return tuple(
            tuple(channel.needed(start, stop, period, phase, spare) for channel in channels) for phase in range(period)
        )

    return TickLoop(
        start,
        stop,
        period,
        inputs=needed(lowered.inputs, lowered.num_inputs),
        cotangents=needed(lowered.cotangents, lowered.num_cotangents),
    )

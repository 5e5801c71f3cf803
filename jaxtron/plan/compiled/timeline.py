"""A compiled program played: its schedule, with the least seconds of each kernel and those of its communication."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.kernels import Kernel, KernelClass, Kernels

# copies beside other work, made by the card's copy engines
COPIES = "copies"


@dataclass
class KernelTotals:
    """Of kernels together: launches, bytes, FLOPs, and seconds that nothing else hides."""

    launches: float = 0.0
    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


@dataclass
class TravelTotals:
    """Of communication together: operations, bytes that a device sends, seconds by itself, and those of them in which
    nothing is computed."""

    launches: float = 0.0
    sent: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0


Totals = TypeVar("Totals", KernelTotals, TravelTotals)


@dataclass(frozen=True)
class Travel:
    """One communication: over which axes, on which link, the bytes a device sends, its seconds.

    `asynchronous` as the census has it; `is_message` marks those between stages of a pipeline, which are not waited for
    here: that is the schedule's.
    """

    axes: str
    link: str
    sent: float
    seconds: float
    asynchronous: bool
    is_message: bool = False


# what is on a link, in order: from when to when
Queue = list[tuple[float, float, Travel | KernelClass]]


@dataclass
class Played:
    """What a computation takes: seconds from its first instruction to its last, and what they are made of. `runs` says
    how often each kernel that only moves numbers runs, by computation and name."""

    seconds: float = 0.0
    kernels: dict[KernelClass, KernelTotals] = field(default_factory=dict)
    travels: dict[str, TravelTotals] = field(default_factory=dict)
    runs: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, other: "Played", times: float) -> None:
        """Another that runs so often after this."""
        self.seconds += times * other.seconds
        for what, kernel in other.kernels.items():
            _add(self.kernels.setdefault(what, KernelTotals()), kernel, times)
        for axes, travel in other.travels.items():
            _add(self.travels.setdefault(axes, TravelTotals()), travel, times)
        for key, number in other.runs.items():
            self.runs[key] = self.runs.get(key, 0.0) + times * number


@dataclass(frozen=True)
class Chosen:
    """A branch of a conditional, how often it runs each time that the conditional does, and where in the program its
    instructions then are (`Chooser`)."""

    computation: str
    times: float
    place: Hashable


# (conditional, the place that it is in) -> its branches; None: the longest
Chooser = Callable[[hlo.Instruction, Hashable], Sequence[Chosen] | None]


class Player:
    """Plays computations on one stream of kernels, one for each link and one of asynchronous copies.

    A kernel starts when the one before it is over. What is started asynchronously goes to the stream of its link when
    that is free, and its end is waited for; all other communication is waited for at once. A loop runs as often as it
    says, once where it does not say; a conditional by `choose`. What is under way beside a loop delays nothing within.
    """

    def __init__(
        self,
        kernels: Kernels,
        least: Callable[[Kernel], float],
        travels: Mapping[str, Travel],
        choose: Chooser = lambda conditional, place: None,
    ) -> None:
        self._kernels = kernels
        self._module = kernels.module
        self._least = least
        self._travels = travels
        self._choose = choose
        self._known: dict[tuple[str, Hashable], Played] = {}

    def play(self, computation: str, place: Hashable = None) -> Played:
        """A computation at a place in the program, which `choose` knows what to make of."""
        key = (computation, place)
        if key not in self._known:
            self._known[key] = self._play(computation, place)
        return self._known[key]

    def _play(self, computation: str, place: Hashable) -> Played:
        found = Played()
        queues: dict[str, Queue] = {}
        # by start: its link, and when it is over
        pending: dict[str, tuple[str, float]] = {}
        for instruction in self._module.computations[computation]:
            if instruction.is_end:
                for name in instruction.operands:
                    if name in pending:
                        link, until = pending.pop(name)
                        _wait(found, queues[link], until)
            elif instruction.opcode == "while":
                trips = hlo.trip_count(self._module, instruction)
                body = dict(instruction.called())["body"]
                found.add(self.play(body, place), 1 if trips is None else trips)
            elif instruction.opcode == "call":
                found.add(self.play(dict(instruction.called())["to_apply"], place), 1)
            elif instruction.opcode == "conditional":
                self._play_branches(found, instruction, place)
            elif (travel := self._travel(instruction)) is not None:
                queue = queues.setdefault(travel.link, [])
                until = _enqueue(found, queue, travel.seconds, travel)
                totals = TravelTotals(1, travel.sent, travel.seconds)
                _add(found.travels.setdefault(travel.axes, TravelTotals()), totals)
                if travel.is_message:
                    continue
                if travel.asynchronous and instruction.operation != instruction.opcode:
                    pending[instruction.name] = (travel.link, until)
                else:
                    _wait(found, queue, until)
            elif (kernel := self._kernels.of(computation, instruction)) is not None:
                seconds = self._least(kernel)
                is_copy = instruction.operation != instruction.opcode and kernel.what in ("copies", "buffers", "fills")
                counted = KernelTotals(1, kernel.read, kernel.written, kernel.flops, 0.0 if is_copy else seconds)
                _add(found.kernels.setdefault(kernel.what, KernelTotals()), counted)
                if is_copy:
                    until = _enqueue(found, queues.setdefault(COPIES, []), seconds, kernel.what)
                    pending[instruction.name] = (COPIES, until)
                else:
                    found.seconds += seconds
                if kernel.what == "copies":
                    found.runs[computation, instruction.name] = 1.0
        return found

    def _play_branches(self, found: Played, conditional: hlo.Instruction, place: Hashable) -> None:
        chosen = self._choose(conditional, place)
        if chosen is None:
            played = [self.play(name, place) for name in hlo.branches(conditional)]
            found.add(max(played, key=lambda one: one.seconds), 1)
            return
        for one in chosen:
            found.add(self.play(one.computation, one.place), one.times)

    def _travel(self, instruction: hlo.Instruction) -> Travel | None:
        """The communication that an instruction is or starts."""
        if instruction.name in self._travels:
            return self._travels[instruction.name]
        if instruction.operation != "async":
            return None
        inside = (
            self._travels.get(one.name) for name in instruction.started() for one in self._module.computations[name]
        )
        return next(filter(None, inside), None)


def _enqueue(found: Played, queue: Queue, seconds: float, what: Travel | KernelClass) -> float:
    """When something is over that is started now on a link that does one thing after the other."""
    begin = max(found.seconds, queue[-1][1] if queue else 0.0)
    queue.append((begin, begin + seconds, what))
    return begin + seconds


def _wait(found: Played, queue: Queue, until: float) -> None:
    """Until a link is so far; what was on it meanwhile was exposed."""
    now = found.seconds
    for begin, end, what in reversed(queue):
        exposed = min(end, until) - max(begin, now)
        if end <= now:
            break
        if isinstance(what, Travel):
            found.travels[what.axes].exposed += max(0.0, exposed)
        else:
            found.kernels[what].seconds += max(0.0, exposed)
    found.seconds = max(now, until)


def _add(total: Totals, part: Totals, times: float = 1.0) -> None:
    for one in fields(total):
        setattr(total, one.name, getattr(total, one.name) + times * getattr(part, one.name))

"""The least that a compiled step takes, kernel by kernel: a roofline of its schedule at a GPU's best known rates."""

import functools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from jaxtron.pipeline.lowering import LoweredSchedule, lower
from jaxtron.pipeline.names import BACKWARD, PAIRED, WEIGHT
from jaxtron.pipeline.schedules.figures import Slot, times, walk
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.communication import collective_timer
from jaxtron.plan.compiled.flops import kind_shares
from jaxtron.plan.compiled.kernels import CLASSES, Kernel, Kernels
from jaxtron.plan.compiled.links import link
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.compiled.timeline import Chosen, Played, Player, Travel
from jaxtron.plan.machine import Machine

# copies that take less of a step than this, or that move fewer bytes at a time, are not named
NOTABLE_COPY, LARGE_COPY = 0.005, 2**25
# in the order of a name that says more
_VERBS = {"transpose": "transposes", "concatenate": "joins", "copy": "copies", "gather": "gathers", "slice": "slices"}


@dataclass(frozen=True)
class ClassBound:
    """Kernels of one class in a step of one GPU. `seconds` are those that nothing hides: of copies beside other work
    what is waited for."""

    launches: int
    read: int
    written: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class TravelBound:
    """Communication over one set of axes: operations, bytes that a GPU sends, seconds by itself, those in which nothing
    is computed."""

    launches: int
    sent: int
    seconds: float
    exposed: float


@dataclass(frozen=True)
class WholeCopy:
    """An array that the compiler copies, transposes or joins: which, how often a step, the bytes moved each time, the
    seconds of a step, and `file:line` where known."""

    what: str
    runs: int
    moved: int
    seconds: float
    location: str


@dataclass(frozen=True)
class Bound:
    """A step that could not be faster: seconds, MFU of them, and what they are made of on the stage with the most work.

    Seconds of `classes`, the exposed ones of `communication` (by axes) and `bubble` add up to `step_seconds`.
    """

    step_seconds: float
    mfu: float
    classes: dict[str, ClassBound]
    communication: dict[str, TravelBound]
    bubble: float
    copies: tuple[WholeCopy, ...]


def step_bound(rehearsal: Rehearsal, machine: Machine, model_flops: float) -> Bound:
    """The bound of a compiled step; `model_flops` are those of one GPU that MFU counts."""
    kernels = Kernels(rehearsal.module)
    played, bubble = _Step(rehearsal, machine, kernels).play()
    seconds = played.seconds + bubble
    classes: dict[str, ClassBound] = {}
    for what in CLASSES:
        if what in played.kernels:
            found = played.kernels[what]
            classes[what] = ClassBound(
                launches=round(found.launches),
                read=round(found.read),
                written=round(found.written),
                flops=round(found.flops),
                seconds=found.seconds,
            )
    return Bound(
        step_seconds=seconds,
        mfu=model_flops / seconds / machine.datasheet.peak_flops if seconds else 0.0,
        classes=classes,
        communication={
            axes: TravelBound(round(found.launches), round(found.sent), found.seconds, found.exposed)
            for axes, found in sorted(played.travels.items(), key=lambda item: -item[1].seconds)
        },
        bubble=bubble,
        copies=_copies(played, kernels, functools.partial(_least, machine), NOTABLE_COPY * seconds),
    )


def _least(machine: Machine, kernel: Kernel) -> float:
    return machine.least_seconds(kernel.flops, kernel.moved, width=kernel.width, is_fused=kernel.is_fused)


def _copies(played: Played, kernels: Kernels, least: functools.partial[float], notable: float) -> tuple[WholeCopy, ...]:
    """Copies of the same kind, shape and place together, the longest first, without those shorter than `notable`."""
    found: dict[tuple[str, str], WholeCopy] = {}
    for (computation, name), runs in played.runs.items():
        instruction = next(one for one in kernels.module.computations[computation] if one.name == name)
        kernel = kernels.of(computation, instruction)
        assert kernel is not None
        if kernel.moved < LARGE_COPY:
            continue
        verb = next((word for opcode, word in _VERBS.items() if opcode in kernel.operations), "converts")
        arrays = " and ".join(f"{one.dtype}[{','.join(map(str, one.shape))}]" for one in instruction.results)
        key = (f"{verb} {arrays}", kernels.location(computation, instruction))
        seconds = runs * least(kernel)
        before = found.get(key)
        if before is None:
            found[key] = WholeCopy(key[0], round(runs), kernel.moved, seconds, key[1])
        else:
            found[key] = WholeCopy(key[0], before.runs + round(runs), kernel.moved, before.seconds + seconds, key[1])
    return tuple(sorted((one for one in found.values() if one.seconds >= notable), key=lambda one: -one.seconds))


@dataclass(frozen=True)
class _Place:
    """Where a conditional lies: in a stage's ticks, in a slot's work on a virtual stage with these ends, or deeper."""

    stage: int | None = None
    is_slot: bool = False
    is_first: bool = False
    is_last: bool = False


_INNER = _Place()


class _Step:
    """One compiled step on one stage after the other."""

    def __init__(self, rehearsal: Rehearsal, machine: Machine, kernels: Kernels) -> None:
        config, self.num_stages = rehearsal.session.config, rehearsal.session.sizes["pipe"]
        self.module, self.stages = rehearsal.module, config.stage_plan(self.num_stages)
        self.shares = kind_shares(self.stages)
        self.travels = _travels(rehearsal, machine)
        self.table = config.schedule(self.num_stages)
        self.counts = _counts(lower(self.table, self.stages.stack_chunks))
        self.slots = _slots(self.module) if self.stages.num_virtual > 1 else {}
        self.visits: Counter[str] = Counter()
        for conditional, visits in self.slots.values():
            self.visits[conditional] += visits
        self.player = Player(kernels, functools.partial(_least, machine), self.travels, self._choose)

    def play(self) -> tuple[Played, float]:
        """The stage with the most work, and the seconds that it waits for others."""
        if self.stages.num_virtual == 1:
            return self.player.play(self.module.entry, _INNER), 0.0
        durations = {kind: self._durations(kind) for kind in self.counts if self.visits[kind]}
        chunks = self.table.num_chunks
        work = []
        for stage in range(self.num_stages):
            mine = [self.table.virtual(stage, chunk) for chunk in range(chunks)]
            each = {kind: sum(seconds[virtual] for virtual in mine) / chunks for kind, seconds in durations.items()}
            work.append(sum(self.counts[kind][stage] * seconds for kind, seconds in each.items()))
        busiest = max(range(self.num_stages), key=lambda stage: work[stage])
        played = self.player.play(self.module.entry, _Place(stage=busiest))
        if self.num_stages == 1:
            return played, 0.0
        return played, max(0.0, self._makespan(durations) - work[busiest])

    def _makespan(self, durations: Mapping[str, Sequence[float]]) -> float:
        """The schedule's length with these seconds of a slot by virtual stage."""
        none = [0.0] * self.table.num_virtual
        slots: dict[Slot, Sequence[float]] = {
            "forward": durations.get("forward", none),
            "backward": durations.get("backward", none),
            "weight": durations.get("weight", none),
        }
        together, saved = durations.get("paired"), {}
        if together is not None:
            saved = {
                (ahead, back): slots["forward"][ahead]
                + slots["backward"][back]
                - (together[ahead] + together[back]) / 2
                for ahead in range(self.table.num_virtual)
                for back in range(self.table.num_virtual)
            }
        messages = [travel.seconds for travel in self.travels.values() if travel.is_message]
        return max(times(walk(self.table), slots, latency=max(messages, default=0.0), saved=saved)[1])

    def _durations(self, kind: str) -> list[float]:
        """Seconds of a slot by virtual stage, an average of the places where it is compiled."""
        found = []
        for virtual in range(self.table.num_virtual):
            total = 0.0
            for branch, (which, visits) in self.slots.items():
                if which == kind:
                    total += visits * self.player.play(branch, self._place(virtual)).seconds
            found.append(total / self.visits[kind])
        return found

    def _place(self, virtual: int) -> _Place:
        """That of a slot's work on a virtual stage."""
        firsts = {part.first_chunk * self.num_stages for part in self.stages.partitions}
        is_last = virtual == self.table.num_virtual - 1
        return _Place(is_slot=True, is_first=virtual in firsts, is_last=is_last)

    def _choose(self, conditional: hlo.Instruction, place: Hashable) -> Sequence[Chosen] | None:
        assert isinstance(place, _Place)
        branches = hlo.branches(conditional)
        kinds = [hlo.kinds(self.module, branch) for branch in branches]
        if all(len(one) == 1 and min(one) in self.shares for one in kinds):
            return [Chosen(name, self.shares[min(one)], _INNER) for name, one in zip(branches, kinds, strict=True)]
        if place.stage is not None:
            return self._of_tick(branches, place.stage)
        return self._of_end(branches, place) if place.is_slot else None

    def _of_tick(self, branches: Sequence[str], stage: int) -> Sequence[Chosen] | None:
        """A slot's work, as often as the stage has such."""
        work = next((name for name in branches if name in self.slots), None)
        if work is None:
            return None
        kind = self.slots[work][0]
        share = self.counts[kind][stage] / self.visits[kind]
        chunks = range(self.table.num_chunks)
        places = Counter(self._place(self.table.virtual(stage, chunk)) for chunk in chunks)
        return [Chosen(work, share * count / len(chunks), place) for place, count in places.items()]

    def _of_end(self, branches: Sequence[str], place: _Place) -> Sequence[Chosen] | None:
        """What enters a chunk, or the head, on the stages that have it: of the two the head has products."""
        played = [self.player.play(name, _INNER) for name in branches]
        products = [one for one in played if "products" in one.kernels]
        if len(branches) != 2 or len(products) > 1:
            return None
        long, short = sorted(zip(played, branches, strict=True), key=lambda one: -one[0].seconds)
        has_it = place.is_last if products else place.is_first
        return [Chosen((long if has_it else short)[1], 1.0, _INNER)]


def _slots(module: hlo.Module) -> dict[str, tuple[str, int]]:
    """The branches of ticks that do a slot's work: of which kind it is, and how often a stage comes by it in a step."""
    found: dict[str, tuple[str, int]] = {}
    for site in hlo.walk(module):
        if site.instruction.opcode != "conditional" or site.conditional:
            continue
        visits = 1
        for loop in site.loops:
            visits *= 1 if loop.trips is None else loop.trips
        work = max(hlo.branches(site.instruction), key=lambda name: _length(module, name))
        found[work] = (_kind(module, work), visits)
    return found


def _length(module: hlo.Module, computation: str) -> int:
    """Instructions of a computation and of all that it calls."""
    total = 0
    for instruction in module.computations.get(computation, ()):
        total += 1 + sum(_length(module, name) for _, name in instruction.called())
    return total


def _kind(module: hlo.Module, computation: str) -> str:
    """Which work of a tick a branch does, by the names of most of its operations: XLA gives some to others alike."""
    marks = {"paired": f"/{PAIRED}/", "weight": f"/{BACKWARD}/{WEIGHT}/", "backward": f"/{BACKWARD}/", "forward": ""}
    sources = filter(None, _sources(module, computation))
    found = Counter(next(kind for kind, mark in marks.items() if mark in source) for source in sources)
    return max(marks, key=lambda kind: found[kind])


def _sources(module: hlo.Module, computation: str) -> list[str]:
    found = []
    for instruction in module.computations.get(computation, ()):
        found.append(instruction.source)
        for _, name in instruction.called():
            found += _sources(module, name)
    return found


def _counts(lowered: LoweredSchedule) -> dict[str, list[int]]:
    """How often each stage has each kind of work in a step."""
    forward, backward, weight = lowered.alone
    tables = {"forward": forward.active, "backward": backward.active, "weight": weight.active, "paired": lowered.paired}
    return {kind: [int(number) for number in table.sum(0)] for kind, table in tables.items()}


def _travels(rehearsal: Rehearsal, machine: Machine) -> dict[str, Travel]:
    """A program's communication by the names of its instructions."""
    timer, folding = collective_timer(rehearsal, machine), rehearsal.session.rules.folding
    found = {}
    for entry in rehearsal.collectives:
        if entry.group_size <= 1:
            continue
        wire = link(folding.mesh.shape, folding.named(entry.axes), rehearsal.gpus_per_node) or "NVLink"
        is_message = entry.kind == "collective_permute" and entry.axes == ("pipe",)
        axes = ",".join(entry.names)
        found[entry.name] = Travel(axes, wire, entry.sent_bytes, timer(entry), entry.asynchronous, is_message)
    return found

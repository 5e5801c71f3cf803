"""Which layers each stage has."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtron.config import UserError
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.schedules.schedule import ChunkPlacement, Entry, Schedule, Work, place
from jaxtron.words import plural


@dataclass(frozen=True)
class Partition:
    """One stack's layers (repeated periods of a pattern, or layers of several kinds) on its virtual stages, in the
    model's order.

    A stage holds its chunks one after the other, each in `slots_per_chunk` slots of its stacked parameters; a chunk
    with fewer layers leaves its last slots empty (zeros). Of several kinds each has stacked parameters, and so slots,
    of its own: those of `by_kind`.
    """

    lengths: tuple[int, ...]
    """Layers of each virtual stage."""
    num_stages: int = 1
    placement: ChunkPlacement = "round_robin"
    first_chunk: int = 0
    """A stage's chunks of the stacks before this one."""
    kinds: tuple[str, ...] = ()
    """The kind of each layer, where they are of several; empty: all layers are alike."""

    @cached_property
    def by_kind(self) -> "dict[str, Partition]":
        """Where the layers of each kind are, numbered among themselves; a stage may have none of a kind."""
        assert not self.kinds or len(self.kinds) == self.num_layers
        ends = list(itertools.accumulate(self.lengths, initial=0))
        parts = [self.kinds[start:end] for start, end in itertools.pairwise(ends)]
        return {
            kind: replace(self, lengths=tuple(part.count(kind) for part in parts), kinds=())
            for kind in dict.fromkeys(self.kinds)
        }

    @property
    def alike(self) -> "tuple[Partition, ...]":
        """The layers that are alike: all, or those of each kind."""
        return tuple(self.by_kind.values()) or (self,)

    @property
    def num_layers(self) -> int:
        """All layers."""
        return sum(self.lengths)

    @property
    def num_chunks(self) -> int:
        """Virtual stages of a stage."""
        return len(self.lengths) // self.num_stages

    @property
    def slots_per_chunk(self) -> int:
        """Slots of a chunk."""
        return max(self.lengths)

    @cached_property
    def slot_layers(self) -> tuple[int, ...]:
        """The number of the layer in each slot of all stages' stacked parameters, -1 in an empty one."""
        layers = [-1] * (self.num_stages * self.num_chunks * self.slots_per_chunk)
        first = 0
        for virtual, length in enumerate(self.lengths):
            stage, chunk = self._place(virtual)
            start = (stage * self.num_chunks + chunk) * self.slots_per_chunk
            layers[start : start + length] = range(first, first + length)
            first += length
        return tuple(layers)

    @cached_property
    def chunk_lengths(self) -> tuple[tuple[int, ...], ...]:
        """Layers by `[stage][chunk]`."""
        lengths = [[0] * self.num_chunks for _ in range(self.num_stages)]
        for virtual, length in enumerate(self.lengths):
            stage, chunk = self._place(virtual)
            lengths[stage][chunk] = length
        return tuple(map(tuple, lengths))

    @property
    def is_in_order(self) -> bool:
        """Whether the slots have the layers in order, none empty."""
        return self.slot_layers == tuple(range(self.num_layers))

    def _place(self, virtual: int) -> tuple[int, int]:
        """Stage, and chunk among those of this stack, of one of its virtual stages."""
        before = self.first_chunk * self.num_stages
        stage, chunk = place(before + virtual, self.num_stages, self.placement)
        return stage, chunk - self.first_chunk


@dataclass(frozen=True)
class StagePlan:
    """Where all stacks are: on the same stages, each with some chunks of every stack, those of the first stack first.

    So virtual stages are numbered as a microbatch passes them: all of the first stack, then all of the next.
    """

    partitions: tuple[Partition, ...]
    """By stack."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.partitions[0].num_stages

    @property
    def placement(self) -> ChunkPlacement:
        """How chunks go round the stages."""
        return self.partitions[0].placement

    @property
    def stack_chunks(self) -> tuple[int, ...]:
        """A stage's chunks of each stack."""
        return tuple(stack.num_chunks for stack in self.partitions)

    @property
    def num_chunks(self) -> int:
        """A stage's chunks of all stacks: those of a schedule that runs them."""
        return sum(self.stack_chunks)

    @property
    def alike(self) -> tuple[tuple[int, Partition], ...]:
        """Layers that are alike, with the number of their stack: all of it, or those of each kind."""
        return tuple((number, part) for number, stack in enumerate(self.partitions) for part in stack.alike)

    def of_kinds(self, kinds: Sequence[tuple[str, ...]]) -> "StagePlan":
        """The same with the kinds of each stack's layers, as `Partition.kinds` has them (empty: as it is)."""
        if not any(kinds):
            return self
        return StagePlan(tuple(replace(stack, kinds=own) for stack, own in zip(self.partitions, kinds, strict=True)))

    @property
    def num_virtual(self) -> int:
        """Virtual stages of all stacks."""
        return self.num_stages * self.num_chunks

    def stack(self, chunk: int) -> int:
        """The stack of one of a stage's chunks."""
        return bisect.bisect_right([stack.first_chunk for stack in self.partitions], chunk) - 1


def one_stage_plan(num_layers: Sequence[int]) -> StagePlan:
    """Stacks of so many layers on one stage, a chunk each."""
    return StagePlan(tuple(Partition((count,), first_chunk=stack) for stack, count in enumerate(num_layers)))


def stage_plan(num_layers: Sequence[int], schedule: Schedule, config: PipelineConfig, leading: int = 0) -> StagePlan:
    """The layers of each stack shared out among its virtual stages, of which all stacks have as many.

    The first stack's first part has the embedding's work, the last stack's last part that of the head and the loss.
    On the first part are the `leading` layers too that lead the first stack, and that no partition has. Raises
    `UserError` where layers are too few, or `pipeline.stage_layers` does not fit.
    """
    assert schedule.num_chunks % len(num_layers) == 0
    chunks = schedule.num_chunks // len(num_layers)
    num_parts = schedule.num_stages * chunks
    sizes = f"mesh.pipe {schedule.num_stages} x pipeline.chunks {chunks}"
    if config.stage_layers is None:
        lengths = _even_lengths(num_layers, num_parts, sizes, config, leading)
    else:
        given = (config.stage_layers[0] - leading, *config.stage_layers[1:])
        lengths = [given[start : start + num_parts] for start in range(0, len(given), num_parts)]
        fits = [sum(part) for part in lengths] == list(num_layers) and len(given) == len(lengths) * num_parts
        if not fits or min(given) < 0:
            several = f" x {len(num_layers)} stacks" if len(num_layers) > 1 else ""
            totals = (num_layers[0] + leading, *num_layers[1:])
            first = f", at least {leading} of them on the first" if leading else ""
            raise UserError(
                f"pipeline.stage_layers {list(config.stage_layers)} must be {num_parts * len(num_layers)} numbers "
                f"({sizes}{several}) that add up to the model's {' and '.join(map(str, totals))} layers{first}"
            )
    return StagePlan(
        tuple(
            Partition(tuple(own), schedule.num_stages, schedule.placement, stack * chunks)
            for stack, own in enumerate(lengths)
        )
    )


def _even_lengths(
    num_layers: Sequence[int], num_parts: int, sizes: str, config: PipelineConfig, leading: int
) -> list[list[int]]:
    last = len(num_layers) - 1
    lengths = []
    for stack, count in enumerate(num_layers):
        if count < num_parts:
            layers = (
                f"the model has {plural(count, 'layer')}"
                if last == 0
                else (f"stack {stack + 1} of the model's {last + 1} has {plural(count, 'layer')}")
            )
            before = f" beside {leading} leading" if leading and stack == 0 else ""
            raise UserError(f"{layers}{before}, too few for {sizes} = {num_parts} parts; change one of them")
        ends = ((config.embedding_weight + leading) * (stack == 0), config.loss_weight * (stack == last))
        lengths.append(_share_out(count, num_parts, *ends))
    return lengths


def forward_only(stages: StagePlan, num_microbatches: int = 1) -> Schedule:
    """Microbatches forward through all stages, each as early as it can be, the older ones first; for evaluation."""
    num_virtual = stages.num_virtual
    places = [place(virtual, stages.num_stages, stages.placement) for virtual in range(num_virtual)]
    table = []
    # how many virtual stages each microbatch on its way has passed, the oldest first
    passed: dict[int, int] = {}
    started = 0
    while passed or started < num_microbatches:
        row = [Entry()] * stages.num_stages
        next_one = [(started, 0)] if started < num_microbatches else []
        for microbatch, virtual in [*passed.items(), *next_one]:
            stage, chunk = places[virtual]
            if not row[stage].is_idle:
                continue
            row[stage] = Entry(forward=Work(chunk, microbatch))
            started = max(started, microbatch + 1)
            passed[microbatch] = virtual + 1
            if passed[microbatch] == num_virtual:
                del passed[microbatch]
        table.append(tuple(row))
    return Schedule("forward", tuple(table), num_microbatches, stages.num_chunks, stages.placement)


def _share_out(num_layers: int, num_parts: int, first: float, last: float) -> list[int]:
    """Numbers of layers whose largest work is least, where the first and the last part have other work too."""
    extra = [first if part == 0 else 0.0 for part in range(num_parts)]
    extra[-1] += last
    lengths = [0] * num_parts
    for _ in range(num_layers):
        # the part with least work takes one more, one in the middle before the ends
        lightest = min(
            range(num_parts), key=lambda part: (lengths[part] + extra[part], part in (0, num_parts - 1), part)
        )
        lengths[lightest] += 1
    return lengths

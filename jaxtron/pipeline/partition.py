"""Which layers each stage has."""

from dataclasses import dataclass
from functools import cached_property

from jaxtron.config import UserError
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.schedules.schedule import Entry, Placement, Schedule, Work, place


@dataclass(frozen=True)
class Partition:
    """Layers (repeated periods of a pattern) on the virtual stages, in the model's order.

    A stage holds its chunks one after the other, each in `chunk_rows` rows of its stacked parameters; a chunk with
    fewer layers leaves its last rows empty (zeros).
    """

    lengths: tuple[int, ...]
    """Layers of each virtual stage."""
    num_stages: int = 1
    placement: Placement = "loop"

    @property
    def num_layers(self) -> int:
        """All layers."""
        return sum(self.lengths)

    @property
    def num_chunks(self) -> int:
        """Virtual stages of a stage."""
        return len(self.lengths) // self.num_stages

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return max(self.lengths)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The number of the layer in each row of all stages' stacked parameters, -1 in an empty one."""
        rows = [-1] * (self.num_stages * self.num_chunks * self.chunk_rows)
        first = 0
        for virtual, length in enumerate(self.lengths):
            stage, chunk = place(virtual, self.num_stages, self.placement)
            start = (stage * self.num_chunks + chunk) * self.chunk_rows
            rows[start : start + length] = range(first, first + length)
            first += length
        return tuple(rows)

    @cached_property
    def chunk_lengths(self) -> tuple[tuple[int, ...], ...]:
        """Layers by [stage][chunk]."""
        lengths = [[0] * self.num_chunks for _ in range(self.num_stages)]
        for virtual, length in enumerate(self.lengths):
            stage, chunk = place(virtual, self.num_stages, self.placement)
            lengths[stage][chunk] = length
        return tuple(map(tuple, lengths))

    @property
    def is_in_order(self) -> bool:
        """Whether the rows are the layers in order, none empty."""
        return self.rows == tuple(range(self.num_layers))


def partition(num_layers: int, schedule: Schedule, config: PipelineConfig) -> Partition:
    """The layers shared out among the schedule's virtual stages; a `UserError` where that cannot be."""
    num_parts = schedule.num_virtual
    sizes = f"mesh.pipe {schedule.num_stages} x pipeline.chunks {schedule.num_chunks}"
    if config.stage_layers is not None:
        lengths = config.stage_layers
        if len(lengths) != num_parts or sum(lengths) != num_layers or min(lengths) < 0:
            raise UserError(
                f"pipeline.stage_layers {list(lengths)} must be {num_parts} numbers ({sizes}) that add up "
                f"to the model's {num_layers} layers"
            )
    elif num_layers < num_parts:
        raise UserError(f"the model's {num_layers} layers are too few for {sizes} = {num_parts} parts")
    else:
        lengths = _share_out(num_layers, num_parts, config.embedding_weight, config.loss_weight)
    return Partition(tuple(lengths), schedule.num_stages, schedule.placement)


def forward_only(partition: Partition, num_microbatches: int = 1) -> Schedule:
    """Microbatches forward through all stages, each as early as it can be, the older ones first; for evaluation."""
    num_virtual = len(partition.lengths)
    places = [place(virtual, partition.num_stages, partition.placement) for virtual in range(num_virtual)]
    table = []
    # how many virtual stages each microbatch on its way has passed, the oldest first
    passed: dict[int, int] = {}
    started = 0
    while passed or started < num_microbatches:
        row = [Entry()] * partition.num_stages
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
    return Schedule(
        "forward", tuple(table), num_microbatches, num_chunks=partition.num_chunks, placement=partition.placement
    )


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

"""Which layers each stage has."""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxtron.config import UserError
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.schedule import Entry, Placement, Schedule, Work, place
from jaxtron.typing import Array


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
    def rows(self) -> Int32[np.ndarray, "rows"]:
        """The number of the layer in each row of all stages' stacked parameters, -1 in an empty one."""
        table = np.full((self.num_stages, self.num_chunks, self.chunk_rows), -1, np.int32)
        first = 0
        for virtual, length in enumerate(self.lengths):
            stage, chunk = place(virtual, self.num_stages, self.placement)
            table[stage, chunk, :length] = np.arange(first, first + length)
            first += length
        return table.reshape(-1)

    @cached_property
    def chunk_lengths(self) -> Int32[np.ndarray, "P chunks"]:
        """Layers by [stage, chunk]."""
        return (self.rows >= 0).reshape(self.num_stages, self.num_chunks, self.chunk_rows).sum(-1, dtype=np.int32)

    @property
    def is_in_order(self) -> bool:
        """Whether the rows are the layers in order, none empty."""
        return bool(np.array_equal(self.rows, np.arange(self.num_layers)))

    def arrange(self, layers: Array) -> Array:
        """Stacked layers in the model's order, as the rows of all stages; empty rows are zeros."""
        if self.is_in_order:
            return layers
        rows = jnp.asarray(self.rows)
        filled = (rows >= 0).reshape(-1, *(1,) * (layers.ndim - 1))
        return jnp.where(filled, layers[jnp.maximum(rows, 0)], jnp.zeros((), layers.dtype))

    def restore(self, rows: Array) -> Array:
        """The inverse of `arrange`."""
        return rows if self.is_in_order else rows[np.argsort(self.rows)[-self.num_layers :]]


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

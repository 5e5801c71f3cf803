"""`python -m jaxtron.plan CONFIG.yaml --search`: layouts for so many GPUs, those that fit ranked by predicted time."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtron.config import UserError, format_value
from jaxtron.gpus import Gpu, gpu_named
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.plan.estimate import Estimator
from jaxtron.plan.machine import Machine
from jaxtron.plan.memory import MemoryUse
from jaxtron.plan.prediction import Breakdown, Prediction, predict
from jaxtron.plan.report import Plan, write_text
from jaxtron.plan.table import aligned, duration, size
from jaxtron.sharding.mesh import AXES, MeshConfig
from jaxtron.train.config import Configuration

# Memory by formula may be so far off: what is this little above the GPU's is left to the compiler.
MARGIN = 0.03
# Rows of a microbatch on a device. More only fill memory: products of so many tokens are large enough.
ROWS = (1, 2, 4, 8, 16)
# Empty rows of the longest part's length, over all layers, that a cut which does not divide them may have.
MOST_EMPTY = 0.1
# All that have a use: gpipe takes the time of 1f1b and more memory.
ONE_CHUNK = ("1f1b", "eager_1f1b", "zero_bubble")
TWO_CHUNKS = ("zero_bubble_v", "dualpipe_v")
MORE_CHUNKS = ("interleaved", "eager_interleaved")


@dataclass(frozen=True)
class Layout:
    """What a search chooses; `rows` are those of a microbatch on a device."""

    data: int
    fsdp: int
    tensor: int
    pipe: int
    pipeline: PipelineConfig
    rows: int
    recompute: str | tuple[str, ...]
    zero: str

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh by axis."""
        return {axis: getattr(self, axis, 1) for axis in AXES}

    def microbatches(self, global_batch: int) -> int:
        """Microbatches of a step."""
        return global_batch // (self.data * self.fsdp * self.rows)

    def config(self, base: Configuration) -> Configuration:
        """The configuration with this layout, not validated again: `predict` checks what can be wrong with it."""
        mesh = MeshConfig(**{axis: part for axis, part in self.sizes.items()})
        microbatches = self.microbatches(base.train.global_batch)
        return base.model_copy(
            update={
                "mesh": mesh,
                "pipeline": self.pipeline,
                "model": base.model.model_copy(update={"recompute": self.recompute}),
                "train": base.train.model_copy(update={"microbatches": microbatches}),
                "sharding": base.sharding.model_copy(update={"zero": self.zero}),
            }
        )

    @property
    def mesh_text(self) -> str:
        """Such as `tensor 8 x pipe 4`."""
        return " x ".join(f"{axis} {part}" for axis, part in self.sizes.items() if part > 1) or "one device"

"""The settings of pipelines."""

from collections.abc import Mapping

from pydantic import Field

from jaxtron.config import Config, FileName, NoEffect, UserError


class PipelineConfig(Config):
    """How microbatches go through the stages of mesh.pipe, and which layers each stage has."""

    schedule: FileName = "1f1b"
    """Order of the stages' work, only with mesh.pipe above 1: gpipe, 1f1b, eager_1f1b, interleaved, eager_interleaved,
    zero_bubble, zero_bubble_v, dualpipe_v, or your own FILE.csv. `python -m jaxtron.plan --schedule` draws it."""
    chunks: int = Field(default=1, ge=1)
    """Parts of the model on each stage, for the schedules that go round more than once."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each part in the model's order (none: as even as can be)."""
    overlap: bool = False
    """A forward and a backward of one tick go through their layers together, so that what one sends to experts or over
    mesh.tensor travels while the other multiplies (eager_1f1b, eager_interleaved, dualpipe_v; parts of equal layers).
    """
    embedding_weight: float = Field(default=0.0, ge=0)
    """Work of the embedding when layers are shared out, counted in layers."""
    loss_weight: float = Field(default=0.0, ge=0)
    """Work of the head and the loss, likewise."""

    def check_effect(self, num_stages: int) -> None:
        """`NoEffect` for settings that do nothing with so many stages (-1: not known yet)."""
        if num_stages == 1 and self != PipelineConfig():
            raise NoEffect("pipeline", self, {"mesh.pipe": 1}, "leave it out, or set --mesh.pipe")

    def check(self, num_stages: int, cut_by: Mapping[str, str]) -> None:
        """`UserError` for settings without effect; `cut_by`: the setting of the model, if any, that cuts it itself."""
        self.check_effect(num_stages)
        if num_stages == 1:
            return
        for name, value in cut_by.items():
            if self.stage_layers is not None:
                raise UserError(
                    f"{name} {value!r} has cuts, and pipeline.stage_layers {list(self.stage_layers)} too; keep one"
                )
        decided = cut_by or ({} if self.stage_layers is None else {"pipeline.stage_layers": self.stage_layers})
        for name in ("embedding_weight", "loss_weight"):
            if decided and getattr(self, name):
                raise NoEffect(f"pipeline.{name}", getattr(self, name), decided)

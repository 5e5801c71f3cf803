"""The settings of pipelines."""

from pydantic import Field

from jaxtron.config import Config, FileName


class PipelineConfig(Config):
    """How microbatches go through the stages of mesh.pipe, and which layers each stage has."""

    schedule: FileName = "1f1b"
    """Order of the stages' work, only with mesh.pipe above 1: gpipe, 1f1b, eager_1f1b, interleaved, eager_interleaved,
    zero_bubble, zero_bubble_v, dualpipe_v, or your own FILE.csv. `python -m jaxtron.plan --schedule` draws it."""
    chunks: int = Field(default=1, ge=1)
    """Parts of the model on each stage, for the schedules that go round more than once."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each part in the model's order (none: as even as can be)."""
    embedding_weight: float = Field(default=0.0, ge=0)
    """Work of the embedding when layers are shared out, counted in layers."""
    loss_weight: float = Field(default=0.0, ge=0)
    """Work of the head and the loss, likewise."""

"""The settings of checkpoints."""

from pydantic import Field, model_validator

from jaxtron.config import Config, FileName, NoEffect


class CheckpointConfig(Config):
    """When a run writes checkpoints, how many it keeps, and whether it continues from them."""

    every: int = Field(default=500, ge=0)
    """steps between checkpoints; 0 writes one at the end only"""
    keep: int = Field(default=2, ge=1)
    """newest checkpoints to keep; 2 leaves one to fall back on if the last is lost"""
    asynchronous: bool = True
    """write files in the background while training goes on"""
    resume: bool = True
    """continue from the newest checkpoint when the run directory has one"""
    initialize_from: FileName | None = None
    """directory whose model a run begins with, where it has no checkpoint yet: of Hugging Face weights, or of a run
    (its newest checkpoint); its settings of the model are taken, while optimizer, schedule and data are new"""
    initialize_adapters: FileName | None = None
    """directory of an adapter that peft saved, which those of train.lora begin with; beside an initialize_from of
    Hugging Face weights"""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.initialize_adapters is not None and self.initialize_from is None:
            raise NoEffect(
                "checkpoint.initialize_adapters",
                self.initialize_adapters,
                {"checkpoint.initialize_from": None},
                "give the directory of the model's own weights",
            )
        return self

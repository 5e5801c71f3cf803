"""The settings of checkpoints."""

from pydantic import Field, model_validator

from jaxtron.config import Config, FileName, NoEffect, UserError


class CheckpointConfig(Config):
    """When a run writes checkpoints, how many it keeps, and whether it continues from them."""

    every: int = Field(default=500, ge=0)
    """steps between checkpoints; 0 writes one at the end only"""
    keep: int = Field(default=2, ge=1)
    """newest checkpoints to keep; 2 leaves one to fall back on if the last is lost"""
    keep_every: int | None = Field(default=None, ge=1)
    """checkpoints of steps that are a multiple of this are kept for good, a multiple of every itself (none: no such)"""
    keep_best: int = Field(default=0, ge=0)
    """checkpoints of least validation loss that are kept too, of all that were saved where it was measured"""
    memory_every: int = Field(default=0, ge=0)
    """steps between copies of the state in the hosts' memory, each host's beside a copy of another host's part; a run
    that is started again goes on from the newest whole one (0: none)"""
    memory_directory: FileName = "/dev/shm"
    """where these copies lie: a file system in memory, which is there for as long as the host is"""
    local_every: int = Field(default=0, ge=0)
    """steps between copies in local_directory (0: none)"""
    local_directory: FileName | None = None
    """directory on a disk of each host's own, for copies more often than run.directory, far away, takes checkpoints"""
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
    allow_missing: tuple[str, ...] = ()
    """patterns of parameters, by the names that plan --layout shows, that need not be in initialize_from and are drawn,
    such as head.*; with it settings of the model may be others than there, and shapes must agree"""
    allow_unused: tuple[str, ...] = ()
    """patterns of what may be in initialize_from and is not used: a run's parameters, or tensors by their names in the
    files; with it settings of the model may be others too"""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.initialize_adapters is not None and self.initialize_from is None:
            raise NoEffect(
                "checkpoint.initialize_adapters",
                self.initialize_adapters,
                {"checkpoint.initialize_from": None},
                "give the directory of the model's own weights",
            )
        for name in ("keep_every", "keep_best"):
            if getattr(self, name) and self.every == 0:
                mend = "only the last is written; leave it out, or set --checkpoint.every"
                raise NoEffect(f"checkpoint.{name}", getattr(self, name), {"checkpoint.every": 0}, mend)
        if self.keep_every is not None and self.keep_every % self.every:
            raise UserError(
                f"checkpoint.keep_every {self.keep_every} is not a multiple of checkpoint.every {self.every}, so some "
                f"that it names are never written; set it to {-(-self.keep_every // self.every) * self.every}"
            )
        if (self.local_directory is None) != (self.local_every == 0):
            name, other = ("every", "directory") if self.local_every else ("directory", "every")
            raise NoEffect(
                f"checkpoint.local_{name}",
                getattr(self, f"local_{name}"),
                {f"checkpoint.local_{other}": getattr(self, f"local_{other}")},
                f"leave it out, or give --checkpoint.local_{other} too",
            )
        if self.memory_every == 0 and self.memory_directory != type(self).model_fields["memory_directory"].default:
            mend = "leave it out, or give --checkpoint.memory_every"
            raise NoEffect("checkpoint.memory_directory", self.memory_directory, {"checkpoint.memory_every": 0}, mend)
        for name in ("allow_missing", "allow_unused"):
            patterns = getattr(self, name)
            if patterns and self.initialize_from is None:
                raise NoEffect(f"checkpoint.{name}", patterns, {"checkpoint.initialize_from": None})
            if not all(patterns):
                raise UserError(f"checkpoint.{name} has an empty pattern; leave it out or give names such as head.*")
        return self

"""Settings of what must happen before JAX starts its devices."""

import re
import shlex
from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, FileName, UserError

Preset = Literal["auto", "none", "latency", "collective_matmul"]
COORDINATES = ("coordinator_address", "num_processes", "process_id")


class RuntimeConfig(Config):
    """Processes, XLA's flags and its compilation cache."""

    launcher: Literal["auto", "none"] = "auto"
    """auto: join the processes that Slurm, Open MPI or Kubernetes started; none: run alone"""
    coordinator_address: str | None = None
    """host:port of process 0, with num_processes and process_id, where no launcher tells"""
    num_processes: int | None = Field(default=None, ge=1)
    """processes of the run, with coordinator_address"""
    process_id: int | None = Field(default=None, ge=0)
    """which of them this one is, from 0"""
    connect_seconds: int = Field(default=300, ge=1)
    """how long the processes wait for each other at the start"""
    heartbeat_seconds: int = Field(default=30, ge=1)
    """how soon the processes end, with a line that names it, when one of them is gone"""
    xla_preset: Preset = "auto"
    """XLA flags for GPUs: auto (latency-hiding scheduler), latency (also pipelined collectives and double-buffered
    loops), collective_matmul (tensor-parallel products in overlapped parts), none"""
    xla_flags: str = ""
    """further XLA flags, '--xla_a=1 --xla_b=2'; they win over the preset's"""
    deterministic: bool = False
    """the same bits from every run on the same mesh and machines: sets model.attention.deterministic, and on GPUs XLA's
    deterministic operations without autotuning, and NCCL without reductions in the switch; slower there"""
    compilation_cache: FileName | None = None
    """directory where compiled programs are kept for later runs; none: not kept"""

    @model_validator(mode="after")
    def _check(self) -> "RuntimeConfig":
        missing = [f"runtime.{name}" for name in COORDINATES if getattr(self, name) is None]
        if missing and len(missing) < len(COORDINATES):
            names = ", ".join(f"runtime.{name}" for name in COORDINATES)
            raise UserError(f"{' and '.join(missing)} missing: give {names} together, or none of them")
        if self.coordinator_address is not None and not re.fullmatch(r"\S+:\d{1,5}", self.coordinator_address):
            raise UserError(
                f"runtime.coordinator_address {self.coordinator_address!r} is not host:port, such as node001:12345"
            )
        if self.process_id is not None and self.num_processes is not None and self.process_id >= self.num_processes:
            raise UserError(
                f"runtime.process_id {self.process_id} is not below runtime.num_processes {self.num_processes}: they "
                "count from 0"
            )
        try:
            words = shlex.split(self.xla_flags)
        except ValueError as error:
            raise UserError(f"runtime.xla_flags {self.xla_flags!r} does not read: {error}") from None
        for word in words:
            if not word.startswith("--"):
                raise UserError(f"runtime.xla_flags: {word!r} does not begin with --, and XLA would ignore it")
        return self

    def check(self, tensor: int, microbatches: int) -> None:
        """`UserError` for a preset that the compiler does not survive with so many tensor parts and microbatches."""
        if self.xla_preset == "collective_matmul" and tensor > 1 and microbatches == 1:
            # seen with JAX 0.11.2: the process ends in XLA's WindowedEinsumHandler without a word
            raise UserError(
                f"runtime.xla_preset collective_matmul with mesh.tensor {tensor} and train.microbatches 1 crashes "
                "XLA's compiler; raise --train.microbatches, or choose another preset"
            )

"""What can be said of this machine and of who started us before JAX is imported."""

import os
from collections.abc import Mapping
from pathlib import Path

from jaxtron.runtime.config import RuntimeConfig


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver, its own or that of Windows below it."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def find_launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """What started this process as one of several: Slurm, Open MPI, Kubernetes, or None for a process on its own."""
    # in an interactive allocation SLURM_NTASKS speaks of the allocation, SLURM_STEP_NUM_TASKS of what really runs
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment and tasks != "1":
        return "Slurm"
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def is_first_process(config: RuntimeConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for the run, as far as its settings or its launcher tell."""
    if config.process_id is not None:
        return config.process_id == 0
    ranks = {"Slurm": "SLURM_PROCID", "Open MPI": "OMPI_COMM_WORLD_RANK", "Kubernetes": "JOB_COMPLETION_INDEX"}
    launcher = find_launcher(environment)
    return launcher is None or environment.get(ranks[launcher], "0") == "0"


def known_devices(
    config: RuntimeConfig, devices: int | None, environment: Mapping[str, str] = os.environ
) -> int | None:
    """Devices of the run where they are sure without asking JAX: simulated ones, or a lone process's CPU; else None."""
    joins = config.coordinator_address is not None or find_launcher(environment) is not None
    if devices is not None:
        # each of several processes simulates as many
        processes = config.num_processes if joins else 1
        return None if processes is None else devices * processes
    told = {"JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"} & environment.keys()
    return None if told or joins or config.xla_flags or has_driver() else 1

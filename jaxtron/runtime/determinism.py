"""What `runtime.deterministic` sets beside settings: XLA's flag, and NCCL's reductions."""

import os

from jaxtron.config import UserError
from jaxtron.runtime.config import RuntimeConfig

# Scatters, products and attention in one order, and no autotuning, which chooses by times that it measures (openxla/xla
# pull request 12520).
FLAG = "--xla_gpu_deterministic_ops"
# reductions inside the NVSwitch, whose order NCCL does not tell; rings and trees have one
NCCL_SWITCH = "NCCL_NVLS_ENABLE"


def deterministic_flags(config: RuntimeConfig, given: dict[str, str]) -> list[str]:
    """The flags of a deterministic run on GPUs; a `UserError` where those `given`, by name, say otherwise."""
    if not config.deterministic:
        return []
    if given.get(FLAG) in ("false", "0"):
        raise UserError(f"runtime.deterministic true, and {FLAG}=false is given: leave one of them out")
    return [] if FLAG in given else [f"{FLAG}=true"]


def set_reductions(config: RuntimeConfig) -> None:
    """Has NCCL reduce without the switch, unless the environment says something itself; before JAX has devices."""
    if config.deterministic:
        os.environ.setdefault(NCCL_SWITCH, "0")


def determinism_line(config: RuntimeConfig, device_kind: str) -> str:
    """What a run says of it, on devices of this kind; empty where it was not asked for."""
    if not config.deterministic:
        return ""
    if device_kind == "cpu":
        return "deterministic: on CPUs a run on the same mesh has the same bits as it is"
    reductions = f"{NCCL_SWITCH}={os.environ.get(NCCL_SWITCH, '')}"
    return f"deterministic: attention adds up in one order, XLA has {FLAG} and tunes nothing, and NCCL {reductions}"

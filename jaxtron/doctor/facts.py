"""What has to be the same on all machines of a run."""

import hashlib
import platform
import subprocess
from pathlib import Path

from jaxtron.config import dump
from jaxtron.doctor.devices import has_devices, read_gpus
from jaxtron.doctor.surroundings import Surroundings
from jaxtron.run.configuration import Configuration

PACKAGE = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jax-cuda12-plugin", "jax-cuda13-plugin")
NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
PREFIXES = ("NCCL_", "XLA_", "JAX_", "LIBTPU_")
# of these, what may differ: who a process is
OWN = ("JAX_PROCESS_ID", "JAX_LOCAL_PROCESS_ID", "XLA_FLAGS_FILE")


def facts_of(around: Surroundings, config: Configuration | None) -> dict[str, str]:
    """By name: the code, versions, GPUs, settings and variables of this machine."""
    facts = {"Jaxtron's code": code_digest(PACKAGE), "commit": _commit(), "Python": platform.python_version()}
    facts |= {name: version for name in (*PACKAGES, *NCCL) if (version := around.version(name)) is not None}
    if has_devices(around):
        gpus = read_gpus(around)
        if isinstance(gpus, list) and gpus:
            facts["driver"] = gpus[0].driver
            facts["GPUs"] = f"{len(gpus)} x {gpus[0].name}"
    if config is not None:
        runtime = config.runtime.model_copy(update={"process_id": None})
        text = dump(config.model_copy(update={"runtime": runtime}))
        facts["settings"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    for name, value in sorted(around.environment.items()):
        if name.startswith(PREFIXES) and name not in OWN:
            facts[name] = value
    return facts


def code_digest(folder: Path) -> str:
    """A short text that two copies of the package share exactly when their Python files are equal."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str:
    """That of the checkout, or that there is none."""
    try:
        result = subprocess.run(
            ["git", "-C", str(PACKAGE), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "no checkout"

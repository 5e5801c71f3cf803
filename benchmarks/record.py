"""Where and when a benchmark ran, and the file that its result goes to."""

import datetime
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxtron.config import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def circumstances(platform: str, device_kind: str, device_count: int) -> dict[str, Any]:
    """Date, git commit, devices and versions; what is not known here is None or left out."""
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions = {"python": sys.version.split()[0], **{name: found[name] for name in PACKAGES if name in found}}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if platform == "gpu" else None
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        "platform": platform,
        "device": device_kind,
        "device_count": device_count,
        "versions": versions | ({"nvidia_driver": driver} if driver else {}),
    }


def gpu_names() -> list[str]:
    """What the driver calls this machine's GPUs, asked for without starting JAX on them; empty without nvidia-smi."""
    return _lines("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def destination(output: str, name: str, device_kind: str) -> Path:
    """The file that `output` means: itself if it ends in .json, else `<date>-<device>-<name>.json` in that folder.

    Makes the folder; `UserError` if it cannot be made.
    """
    path = Path(output)
    if path.suffix != ".json":
        device = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
        path = path / f"{datetime.date.today().isoformat()}-{device}-{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} for the benchmark's result cannot be made: {error.strerror}") from None
    return path


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result; `UserError` if it cannot be."""
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the benchmark's result {path} cannot be written: {error.strerror}") from None


def _output(*command: str) -> str | None:
    """First line of what a command prints, or None where it is missing or fails."""
    return next(iter(_lines(*command)), None)


def _lines(*command: str) -> list[str]:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.strip().splitlines() if result.returncode == 0 else []

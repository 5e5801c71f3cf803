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
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    *(f"jax-cuda{version}-{part}" for version in (12, 13) for part in ("plugin", "pjrt")),
    *("torch", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas"),
)


def circumstances(platform: str, device_kind: str, device_count: int) -> dict[str, Any]:
    """Date, git commit, devices and versions; what is not known here is None or left out."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if platform == "gpu" else None
    cuda = re.search(r"CUDA Version: *([\d.]+)", "\n".join(_lines("nvidia-smi"))) if driver else None
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "platform": platform,
        "device": device_kind,
        "device_count": device_count,
        "versions": versions()
        | ({"nvidia_driver": driver} if driver else {})
        | ({"cuda_of_driver": cuda[1]} if cuda else {}),
    }


def versions() -> dict[str, str]:
    """Python's, and of the packages that are here those that figures depend on, as an import finds them."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        # of two installations of one package an import takes the first
        found.setdefault(name, distribution.version)
    return {"python": sys.version.split()[0], **{name: found[name] for name in PACKAGES if name in found}}


def commit(root: Path = ROOT) -> str | None:
    """The commit of these files, with -dirty where they differ from it: git's, else the one that was carried with them.

    The carried one, beside the wheels of `make wheels`, ends in -changed where the files are others than it was written
    for. None where neither is known.
    """
    folder = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    # files in a folder of another repository are not of its commit
    if folder is not None and Path(folder).resolve() == root:
        return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return _output(sys.executable, str(root / "tools" / "wheels"), "--commit")


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

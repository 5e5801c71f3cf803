"""What a machine has for JAX on its NVIDIA GPUs, found without starting JAX: driver, plugin, CUDA's assembler."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxtron.runtime.devices import expects_gpu
from jaxtron.runtime.machine import has_driver

# what JAX 0.11's kernels are written in is read by the assembler of this CUDA and of newer ones
NEEDED_CUDA = (13, 0)
LIBDEVICE = "nvvm/libdevice/libdevice.10.bc"
# where XLA looks for it by itself
USUAL = (Path("/usr/local/cuda"), Path("/opt/cuda"))
DATA_FLAG = "--xla_gpu_cuda_data_dir"


def cuda_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of a CUDA that has ptxas and libdevice: the one the user names, else the first that is new enough.

    Named by CUDA_ROOT or CUDA_HOME; else NVIDIA's wheels beside JAX, the one whose ptxas is on PATH, those in
    /usr/local and /opt. None without any.
    """
    for name in ("CUDA_ROOT", "CUDA_HOME"):
        if environment.get(name) and _is_whole(Path(environment[name])):
            return Path(environment[name])
    found = [folder for folder in dict.fromkeys(_candidates(environment)) if _is_whole(folder)]
    return next((folder for folder in found if (assembler(folder) or (0, 0)) >= NEEDED_CUDA), next(iter(found), None))


def cuda_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to set so that JAX and XLA find that folder, whatever the user has set already left as it is.

    Empty where there is none. JAX reads CUDA_ROOT, its kernels look for ptxas and nvlink on PATH, and XLA for libdevice
    in folders of its own unless a flag names another.
    """
    folder = cuda_folder(environment)
    if folder is None:
        return {}
    words = environment.get("PATH", "").split(os.pathsep)
    binaries = str(folder / "bin")
    found = {
        "CUDA_ROOT": str(folder),
        "PATH": os.pathsep.join([binaries, *(word for word in words if word != binaries)]),
    }
    flags = environment.get("XLA_FLAGS", "").strip()
    # a word without dashes is a file of flags
    if folder not in USUAL and DATA_FLAG not in flags and (not flags or flags.startswith("--")):
        found["XLA_FLAGS"] = f"{flags} {DATA_FLAG}={folder}".strip()
    return found


def assembler(folder: Path) -> tuple[int, int] | None:
    """The release of a folder's ptxas, or None where it does not run."""
    try:
        said = subprocess.run(
            [folder / "bin" / "ptxas", "--version"], capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+)\.(\d+)", said)
    return (int(release[1]), int(release[2])) if release else None


def lacking(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What keeps JAX from its GPUs here, a sentence each; empty where nothing does."""
    found = []
    if not has_driver():
        found.append("no driver: neither /dev/nvidiactl nor /dev/dxg is there (a container needs its GPUs given to it)")
    plugins = [f"jax_cuda{version}_plugin" for version in (12, 13)]
    if not any(importlib.util.find_spec(name) for name in plugins):
        found.append(f"no CUDA plugin of JAX in {sys.executable}: jax[cuda12] or jax[cuda13]")
    if not found and not expects_gpu(environment):
        found.append(f"JAX_PLATFORMS={environment.get('JAX_PLATFORMS')} keeps JAX from its GPUs: unset it")
    return found


def doubtful(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What is likely to fail some sections here, a sentence each."""
    folder = cuda_folder(environment)
    if folder is None:
        return [f"no CUDA with bin/ptxas and {LIBDEVICE}: kernels may not compile; export CUDA_ROOT=/path/to/cuda"]
    found, release = [], assembler(folder)
    if release is None or release < NEEDED_CUDA:
        said = "does not run" if release is None else f"is CUDA {release[0]}.{release[1]}'s"
        found.append(f"{folder}/bin/ptxas {said}, and JAX's kernels want that of CUDA 13.0 or newer: set CUDA_ROOT")
    if not (folder / "bin" / "nvlink").exists() and shutil.which("nvlink", path=environment.get("PATH")) is None:
        found.append(f"no nvlink in {folder}/bin nor on PATH")
    return found


def _candidates(environment: Mapping[str, str]) -> Iterator[Path]:
    for entry in sys.path:
        yield from (Path(entry) / "nvidia" / name for name in ("cu13", "cuda_nvcc"))
    for entry in environment.get("PATH", "").split(os.pathsep):
        program = Path(entry or ".") / "ptxas"
        if program.exists():
            yield from (program.absolute().parents[1], program.resolve().parents[1])
    yield from USUAL
    yield from _others()


def _others() -> Iterator[Path]:
    for folder in ("/usr/local", "/opt"):
        yield from sorted(Path(folder).glob("cuda-*"), reverse=True)


def _is_whole(folder: Path) -> bool:
    return os.access(folder / "bin" / "ptxas", os.X_OK) and (folder / LIBDEVICE).exists()

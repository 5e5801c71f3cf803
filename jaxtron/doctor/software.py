"""Python packages and CUDA's assembler: versions that go together."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxtron.doctor.finding import Finding, doubt, fault, good
from jaxtron.doctor.surroundings import ABSENT, Surroundings

OLDEST, NEWEST = (0, 10, 2), (0, 12)
CUDAS = (12, 13)
# the first JAX whose kernels only a newer assembler reads, and that assembler's CUDA: PTX 9.0
NEW_KERNELS, NEEDED_CUDA = (0, 11), (13, 0)
USUAL = ("/usr/local/cuda", "/opt/cuda")


def check_packages(around: Surroundings, *, gpu: bool) -> Iterator[Finding]:
    """JAX, its plugin for CUDA and NCCL; what only GPUs need where there are any."""
    jax, jaxlib = around.version("jax"), around.version("jaxlib")
    if jax is None or jaxlib is None:
        lacking = "jax" if jax is None else "jaxlib"
        yield fault("jax", f"no {lacking} in {sys.executable}", "pip install jaxtron, or take the right Python")
        return
    if _numbers(jax)[:2] != _numbers(jaxlib)[:2]:
        yield fault("jax", f"jax {jax} with jaxlib {jaxlib}", f"pip install jaxlib=={jax}")
        return
    if not OLDEST <= _numbers(jax) < NEWEST:
        yield fault("jax", f"jax {jax} is not one that Jaxtron supports", "pip install 'jax>=0.10.2,<0.12'")
        return
    yield good("jax", f"jax {jax}, jaxlib {jaxlib}")
    if not gpu:
        return
    plugins = {cuda: around.version(f"jax-cuda{cuda}-plugin") for cuda in CUDAS}
    there = [cuda for cuda, version in plugins.items() if version is not None]
    if not there:
        yield fault("plugin", f"JAX has no plugin for CUDA in {sys.executable}", "pip install 'jaxtron[cuda13]'")
        return
    if len(there) > 1:
        yield doubt("plugin", "plugins for CUDA 12 and 13 are both installed", "pip uninstall jax-cuda12-plugin")
    cuda = there[-1]
    for name in (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt"):
        version = around.version(name)
        if version is None or _numbers(version)[:3] != _numbers(jaxlib)[:3]:
            found = "missing" if version is None else version
            yield fault("plugin", f"{name} is {found} and jaxlib {jaxlib}", f"pip install {name}=={jaxlib}")
            break
    else:
        yield good("plugin", f"CUDA {cuda}, {plugins[cuda]}")
    nccl = around.version(f"nvidia-nccl-cu{cuda}")
    if nccl is None:
        yield doubt("nccl", f"no nvidia-nccl-cu{cuda} beside JAX", f"pip install 'jaxtron[cuda{cuda}]'")
    else:
        yield good("nccl", nccl)
    yield from _check_assembler(around, jax, cuda)


def check_libraries(around: Surroundings) -> Iterator[Finding]:
    """Libraries that a variable puts before those of JAX's own packages."""
    for folder in filter(None, around.environment.get("LD_LIBRARY_PATH", "").split(":")):
        for pattern in ("libnccl.so*", "libcudnn.so*", "libcublas.so*"):
            try:
                found = sorted(around.path(folder).glob(pattern))
            except OSError:
                continue
            if found:
                yield doubt(
                    "libraries",
                    f"LD_LIBRARY_PATH puts {folder}/{found[0].name} before that of JAX's packages",
                    "unset LD_LIBRARY_PATH",
                )
                return


def _check_assembler(around: Surroundings, jax: str, cuda: int) -> Iterator[Finding]:
    name = str(_assembler(around))
    answer = around.ask([name, "--version"])
    found = re.search(r"release (\d+)\.(\d+)", answer.text)
    if answer.code == ABSENT or found is None:
        yield fault(
            "ptxas",
            "no ptxas that runs: kernels do not compile",
            f"pip install nvidia-cuda-nvcc-cu{cuda}, or put that of a CUDA on PATH",
        )
        return
    release = int(found[1]), int(found[2])
    text = f"CUDA {release[0]}.{release[1]} ({name})"
    if _numbers(jax) >= NEW_KERNELS and release < NEEDED_CUDA:
        yield fault(
            "ptxas",
            f"{text}, and what JAX {jax} writes of Jaxtron's kernels only that of CUDA 13.0 and newer reads",
            "pip install 'jaxtron[cuda13]', or jax==0.10.2",
        )
    else:
        yield good("ptxas", text)


def _assembler(around: Surroundings) -> Path | str:
    """Where JAX's kernels find it: CUDA_ROOT, NVIDIA's packages beside JAX, the usual folders, PATH."""
    roots = [around.environment[name] for name in ("CUDA_ROOT", "CUDA_HOME") if around.environment.get(name)]
    for entry in filter(None, sys.path):
        roots += [f"{entry}/nvidia/{folder}" for folder in ("cu13", "cuda_nvcc")]
    for root in (*roots, *USUAL):
        if around.path(f"{root}/bin/ptxas").exists():
            return around.path(f"{root}/bin/ptxas")
    return "ptxas"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", version)[:4])

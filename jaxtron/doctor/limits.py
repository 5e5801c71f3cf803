"""What the system allows a process, and variables that others left behind."""

import resource
from collections.abc import Iterator
from os import statvfs

from jaxtron.doctor.finding import Finding, doubt, fault, good
from jaxtron.doctor.surroundings import Surroundings
from jaxtron.words import readable_bytes

FEW_FILES, ENOUGH_FILES = 1024, 4096
# of /dev/shm, by which NCCL joins the GPUs of a machine; containers have 64 MiB unless told otherwise
SHARED_BYTES = 2**30
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
SLOWER = {
    "NCCL_P2P_DISABLE": "GPUs of a machine would not speak over NVLink",
    "NCCL_IB_DISABLE": "machines would not speak over InfiniBand",
    "NCCL_SHM_DISABLE": "GPUs of a machine would not use shared memory",
    "CUDA_LAUNCH_BLOCKING": "the host would wait for every kernel",
}


def check_limits(around: Surroundings, *, gpu: bool) -> Iterator[Finding]:
    """Open files, memory that may be mapped and locked, processors, shared memory."""
    yield _files(around)
    space, _ = around.limit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield (fault if gpu else doubt)(
            "limits",
            f"a process may map {readable_bytes(space)} (ulimit -v), and JAX maps far more",
            "ulimit -v unlimited",
        )
    locked, _ = around.limit(resource.RLIMIT_MEMLOCK)
    if _adapters(around) and locked != resource.RLIM_INFINITY:
        yield fault(
            "limits",
            f"{readable_bytes(locked)} may be locked (ulimit -l), and InfiniBand locks what it sends",
            "ulimit -l unlimited, or memlock in /etc/security/limits.conf, for Slurm in slurmd's unit",
        )
    if around.usable == 1 < around.processors:
        yield doubt(
            "processors",
            f"this process may use 1 of {around.processors} processors, and reading data takes more",
            "--cpus-per-task with SRUN_CPUS_PER_TASK for Slurm, --bind-to none for mpirun",
        )
    else:
        yield good("processors", f"{around.usable} of {around.processors}")
    if gpu:
        yield _shared_memory(around)


def _files(around: Surroundings) -> Finding:
    soft, hard = around.limit(resource.RLIMIT_NOFILE)
    most = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    mend = f"ulimit -n {min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536}"
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return fault("files", f"a process may open {most} files", mend)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_FILES:
        return doubt("files", f"a process may open {most} files: few for checkpoints of many parts", mend)
    return good("files", f"{most} may be open")


def _shared_memory(around: Surroundings) -> Finding:
    path = around.path("/dev/shm")
    try:
        size = _size(str(path))
    except OSError:
        return fault("shared memory", "there is no /dev/shm, which NCCL needs", "mount it: --ipc=host for a container")
    if size < SHARED_BYTES:
        return fault(
            "shared memory",
            f"/dev/shm has {readable_bytes(size)}: too little for NCCL between the GPUs of a machine",
            "--shm-size=16g or --ipc=host for a container, an emptyDir of medium Memory for a pod",
        )
    return good("shared memory", readable_bytes(size))


def _size(path: str) -> int:
    found = statvfs(path)
    return found.f_blocks * found.f_frsize


def check_variables(around: Surroundings) -> Iterator[Finding]:
    """Variables that name what is not here, or make a run slow; adapters that are down."""
    environment = around.environment
    names = environment.get("NCCL_SOCKET_IFNAME", "")
    if names and names[0] != "^":
        there = sorted(path.name for path in around.path("/sys/class/net").glob("*"))
        for name in names.removeprefix("=").split(","):
            exact = names.startswith("=")
            if not any(one == name if exact else one.startswith(name) for one in there):
                yield fault(
                    "variables",
                    f"NCCL_SOCKET_IFNAME={names} and this machine has {', '.join(there)}",
                    "name one of these, or unset it",
                )
                break
    for name, what in SLOWER.items():
        if environment.get(name, "0") not in ("", "0"):
            yield doubt("variables", f"{name}={environment[name]}: {what}", f"unset {name}")
    if environment.get("XLA_FLAGS", "").strip() and not environment["XLA_FLAGS"].strip().startswith("--"):
        yield fault(
            "variables", f"XLA_FLAGS={environment['XLA_FLAGS']} is a file of flags", "write the flags themselves"
        )
    proxy = next((name for name in PROXIES if environment.get(name)), None)
    excepted = environment.get("no_proxy", environment.get("NO_PROXY", ""))
    if proxy is not None and not any(word in excepted.split(",") for word in ("*", "127.0.0.1", "localhost")):
        yield doubt(
            "variables",
            f"{proxy} is set, and JAX's processes may ask that proxy for each other",
            "export no_proxy=127.0.0.1,localhost and the names of the hosts",
        )
    for state in around.path("/sys/class/infiniband").glob("*/ports/*/state"):
        said = state.read_text().strip()
        if "ACTIVE" not in said:
            adapter = state.parts[-4]
            yield doubt("network", f"{adapter} port {state.parts[-2]} is {said}", "see ibstat; check cable and switch")


def _adapters(around: Surroundings) -> bool:
    return any(around.path("/sys/class/infiniband").glob("*"))

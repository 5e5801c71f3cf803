"""The driver and the GPUs of a machine, by what the driver's own program says of them."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxtron.doctor.finding import Finding, doubt, fault, good
from jaxtron.doctor.surroundings import ABSENT, SILENT, Surroundings

FIELDS = "index,name,driver_version,memory.total,memory.used,mig.mode.current,ecc.errors.uncorrected.volatile.total"
# MiB that a GPU may have in use before a run: what the driver itself keeps
BUSY_MIB = 1024
# the first driver that runs programs of this CUDA
DRIVERS = {"cuda12": 525, "cuda13": 580}
NVIDIA = "0x10de"


class GpuState(NamedTuple):
    """A line of nvidia-smi; memory in MiB."""

    index: str
    name: str
    driver: str
    total: int
    used: int
    mig: str
    errors: str


def read_gpus(around: Surroundings) -> list[GpuState] | Finding:
    """What nvidia-smi says, or why it says nothing."""
    answer = around.ask(["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"])
    if answer.code == ABSENT:
        return fault(
            "driver", "there are NVIDIA devices and no nvidia-smi", "install the driver, or give it to the container"
        )
    if answer.code == SILENT:
        return fault("driver", "nvidia-smi gives no answer: a GPU or the driver hangs", "drain and restart the machine")
    if answer.code:
        said = " ".join(answer.text.split())[:200]
        advice = "restart the machine" if "mismatch" in said else "see dmesg; restart the machine or its driver"
        return fault("driver", f"nvidia-smi fails: {said}", advice)
    rows = [[word.strip() for word in line.split(",")] for line in answer.text.splitlines() if line.strip()]
    if any(len(row) != 7 for row in rows):
        said = " ".join(answer.text.split())[:200]
        return fault("driver", f"nvidia-smi says what nobody understands: {said}", "update the driver")
    return [GpuState(*row[:3], _mib(row[3]), _mib(row[4]), *row[5:]) for row in rows]


def has_devices(around: Surroundings) -> bool:
    """Whether there is a driver: its device, or that of Windows below."""
    return any(around.path(name).exists() for name in ("/dev/nvidiactl", "/dev/dxg"))


def check_devices(around: Surroundings, expected: int | None) -> Iterator[Finding]:
    """The driver, and as many whole, idle, visible GPUs as are expected (None: as many as there are)."""
    if not has_devices(around):
        yield _without_driver(around, expected)
        return
    gpus = read_gpus(around)
    if isinstance(gpus, Finding):
        yield gpus
        return
    if not gpus:
        yield fault("gpus", "the driver has no GPU", "see dmesg and lspci; restart the machine")
        return
    driver = gpus[0].driver
    needed = max((number for name, number in DRIVERS.items() if around.version(f"jax-{name}-plugin")), default=0)
    if _leading(driver) < needed:
        yield fault(
            "driver",
            f"driver {driver} is older than the {needed} that this CUDA needs",
            "update it, or install jaxtron[cuda12]",
        )
    else:
        yield good("driver", driver)
    yield from _check_each(gpus)
    yield from _check_number(around, gpus, expected)


def _without_driver(around: Surroundings, expected: int | None) -> Finding:
    cards = [
        path for path in around.path("/sys/bus/pci/devices").glob("*/vendor") if path.read_text().strip() == NVIDIA
    ]
    if cards:
        return fault(
            "driver", "an NVIDIA card and no driver (/dev/nvidiactl)", "install it, or give the container its GPUs"
        )
    if expected:
        return fault(
            "gpus", f"no NVIDIA driver where {expected} GPUs are expected", "take another machine, or --gpus 0"
        )
    return good("driver", "none: runs here use the CPU")


def _check_each(gpus: list[GpuState]) -> Iterator[Finding]:
    if len({gpu.name for gpu in gpus}) > 1:
        kinds = ", ".join(sorted({gpu.name for gpu in gpus}))
        yield doubt("gpus", f"several kinds of GPU: {kinds}", "choose one kind with CUDA_VISIBLE_DEVICES")
    for gpu in gpus:
        if gpu.used > BUSY_MIB:
            yield fault(
                "gpus",
                f"GPU {gpu.index} has {gpu.used:,} of {gpu.total:,} MiB in use already",
                "end what uses it: nvidia-smi names the processes",
            )
        if gpu.errors.isdigit() and int(gpu.errors):
            yield fault(
                "gpus",
                f"GPU {gpu.index} had {gpu.errors} errors of memory that could not be corrected",
                "drain the machine and reset the GPU",
            )
        if gpu.mig == "Enabled":
            yield doubt("gpus", f"GPU {gpu.index} is cut into MIG instances", "nvidia-smi -mig 0, where you may")


def _check_number(around: Surroundings, gpus: list[GpuState], expected: int | None) -> Iterator[Finding]:
    visible = around.environment.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [word for word in visible.split(",") if word.strip()]
    local = next(
        (
            int(around.environment[name])
            for name in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
            if around.environment.get(name, "").isdigit()
        ),
        0,
    )
    if names is not None and local >= max(1, len(names)):
        yield fault(
            "gpus",
            f"this process is number {local} of its machine and sees {len(names)} GPU (CUDA_VISIBLE_DEVICES={visible})",
            "leave out --gpus-per-task and --gpu-bind: JAX takes GPU number n for process n",
        )
        return
    count = len(gpus) if names is None else len(names)
    why = f"CUDA_VISIBLE_DEVICES={visible}" if names is not None else "nvidia-smi -L names them"
    if not count:
        yield fault("gpus", "CUDA_VISIBLE_DEVICES is empty and hides all GPUs", "unset it")
    elif expected is not None and count < expected:
        yield fault("gpus", f"{count} where {expected} are expected ({why})", "drain the machine, or ask for fewer")
    else:
        yield good("gpus", f"{count} x {gpus[0].name}")


def _mib(word: str) -> int:
    return int(float(word)) if word.replace(".", "", 1).isdigit() else 0


def _leading(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdigit() else 0

"""The GPUs Jaxtron knows by name: what the compiler, the memory check and MFU need of each."""

import functools
import math
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtron.config import UserError

# The part of a GPU's memory that JAX's pool may take; by itself JAX takes three quarters. The rest is for what is
# beside the pool: CUDA's context, kernels, workspaces of libraries and NCCL's buffers, 6 GiB of an H100's 79.
POOL_FRACTION = 0.92
# the second is the first's new name; JAX refuses to have both
POOL_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


def pool_fraction(environment: Mapping[str, str] = os.environ) -> float:
    """The part of a GPU's memory that JAX's pool may take in a run: the user's, by JAX's own variable, or ours.

    Raises `UserError` for what JAX would not start with.
    """
    given = [name for name in POOL_VARIABLES if environment.get(name)]
    if not given:
        return POOL_FRACTION
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both in the environment, and JAX takes one: unset the first")
    text = environment[given[0]]
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < math.inf:
        raise UserError(f"{given[0]}={text} in the environment is not a part of the memory: unset it, or take 0.9")
    return fraction


def set_pool_fraction(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets JAX's pool take so much of each GPU, unless the user decided otherwise; before JAX starts on the GPUs."""
    fraction = pool_fraction(environment)
    if not any(environment.get(name) for name in POOL_VARIABLES):
        environment[POOL_VARIABLES[0]] = str(fraction)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of GPU: sizes in bytes, bandwidths in bytes/s (one direction), peak in dense bfloat16 FLOP/s."""

    name: str
    device_kind: str
    compute_capability: str
    num_cores: int
    fpus_per_core: int
    clock_ghz: float
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    peak_flops: float
    nvlink_bandwidth: float
    network_bandwidth: float
    target_file: str | None = None
    """The text of a target description that was read, instead of one made of these figures."""

    @property
    def pool_bytes(self) -> int:
        """Bytes of the memory that JAX's pool may take."""
        return round(min(1.0, pool_fraction()) * self.memory_bytes)

    @property
    def target_config(self) -> str:
        """The text of XLA's `GpuTargetConfigProto`, for compiling without the device."""
        if self.target_file is not None:
            return self.target_file
        major, minor = self.compute_capability.split(".")
        # sm_90 and later have instructions that exist for that one architecture only (wgmma, tcgen05)
        feature = "feature_extension: ACCELERATED_FEATURES" if int(major) >= 9 else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block_optin: {self.shared_memory_per_block}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              core_count: {self.num_cores} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.clock_ghz}
              memory_bandwidth: {round(self.memory_bandwidth)} device_memory_size: {self.memory_bytes}
              l2_cache_size: {self.l2_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
              name: "{self.device_kind}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.device_kind}"
        """


_HOPPER_SHARED: Any = {"shared_memory_per_core": 233472, "shared_memory_per_block": 232448}

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",
            device_kind="NVIDIA A100-SXM4-80GB",
            compute_capability="8.0",
            num_cores=108,
            fpus_per_core=64,
            clock_ghz=1.41,
            memory_bytes=85_100_068_864,
            memory_bandwidth=2.03904e12,
            l2_bytes=41_943_040,
            shared_memory_per_core=167936,
            shared_memory_per_block=166912,
            peak_flops=312e12,
            nvlink_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Gpu(
            name="h100",
            device_kind="NVIDIA H100 80GB HBM3",
            compute_capability="9.0",
            num_cores=132,
            fpus_per_core=128,
            clock_ghz=1.98,
            memory_bytes=84_942_979_072,
            memory_bandwidth=3.35232e12,
            l2_bytes=52_428_800,
            peak_flops=989e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
            **_HOPPER_SHARED,
        ),
        Gpu(
            name="h200",
            device_kind="NVIDIA H200",
            compute_capability="9.0",
            num_cores=132,
            fpus_per_core=128,
            clock_ghz=1.98,
            memory_bytes=151_397_597_184,
            memory_bandwidth=4.8e12,
            l2_bytes=52_428_800,
            peak_flops=989e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
            **_HOPPER_SHARED,
        ),
        Gpu(
            name="b200",
            device_kind="NVIDIA B200",
            compute_capability="10.0",
            num_cores=148,
            fpus_per_core=128,
            clock_ghz=1.965,
            memory_bytes=191_514_411_008,
            memory_bandwidth=7.67232e12,
            l2_bytes=132_644_864,
            peak_flops=2250e12,
            nvlink_bandwidth=900e9,
            network_bandwidth=50e9,
            **_HOPPER_SHARED,
        ),
        Gpu(
            name="gb200",
            device_kind="NVIDIA GB200",
            compute_capability="10.0",
            num_cores=152,
            fpus_per_core=128,
            clock_ghz=2.062,
            memory_bytes=197_897_748_480,
            memory_bandwidth=7.928064e12,
            l2_bytes=135_528_448,
            peak_flops=2500e12,
            nvlink_bandwidth=900e9,
            network_bandwidth=50e9,
            **_HOPPER_SHARED,
        ),
    )
}

# a part of a protocol buffer as text: white space, a comment, a brace, or a field with its value
_FIELD = re.compile(
    r"\s+|#[^\n]*|(?P<opened>[A-Za-z_]\w*\s*:?\s*\{)|(?P<closed>\})"
    r'|[A-Za-z_]\w*\s*:\s*(?:-?\d[\w.+-]*|"[^"\n]*"|[A-Za-z_]\w*)[,;]?'
)
TARGET_SUFFIXES = (".textproto", ".pbtxt", ".txtpb")

# what drivers call the devices, the more specific name first; NVIDIA's datasheets, without sparsity
_PEAKS = (
    (r"\bA100\b", GPUS["a100"].peak_flops),
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(H100|H200) NVL\b", 835e12),
    (r"\b(H100|H200|GH200)\b", GPUS["h100"].peak_flops),
    (r"\bGB200\b", GPUS["gb200"].peak_flops),
    (r"\bB200\b", GPUS["b200"].peak_flops),
)


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`, in any case, or described by the target file of that path; a `UserError` for others."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if Path(name).suffix in TARGET_SUFFIXES:
        return _read_target(Path(name))
    raise UserError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}, or a target's file (.textproto)")


@functools.cache
def _read_target(path: Path) -> Gpu:
    """A GPU from the text of XLA's `GpuTargetConfigProto`, such as `xla/tools/hlo_opt` reads.

    What such a file does not tell, the links and the peak of a core, is that of the known GPU of its architecture.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the target {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the target {path} is no text: byte {error.start} is not UTF-8; give it as text") from None
    _check_syntax(path, text)

    def number(name: str) -> float:
        match = re.search(rf"\b{name}:\s*(\d+(?:\.\d+)?)(?![\w.])", text)
        if match is None or (float(match[1]) == 0 and name != "minor"):
            what = "no" if match is None else "a zero for"
            raise UserError(f"the target {path} has {what} {name}: it is no GpuTargetConfigProto as text")
        return float(match[1])

    major = int(number("major"))
    kin = next((gpu for gpu in GPUS.values() if gpu.compute_capability.startswith(f"{major}.")), None)
    if kin is None:
        known = ", ".join(sorted({gpu.compute_capability for gpu in GPUS.values()}))
        raise UserError(f"the target {path} has compute capability {major}; known are {known}")
    cores, clock = int(number("core_count")), number("clock_rate_ghz")
    minor = re.search(r"\bminor:\s*(\d+)", text)
    described = re.search(r'\bdevice_description_str:\s*"([^"]*)"', text)
    return replace(
        kin,
        name=path.stem,
        device_kind=described[1] if described else path.stem,
        compute_capability=f"{major}.{minor[1] if minor else 0}",
        num_cores=cores,
        fpus_per_core=int(number("fpus_per_core")),
        clock_ghz=clock,
        memory_bytes=int(number("device_memory_size")),
        memory_bandwidth=number("memory_bandwidth"),
        l2_bytes=int(number("l2_cache_size")),
        shared_memory_per_core=int(number("shared_memory_per_core")),
        shared_memory_per_block=int(number("shared_memory_per_block_optin")),
        peak_flops=kin.peak_flops * cores * clock / (kin.num_cores * kin.clock_ghz),
        target_file=text,
    )


def _check_syntax(path: Path, text: str) -> None:
    """`UserError` unless the text is fields and messages in braces; XLA would write to standard error by itself."""
    place = depth = 0
    while place < len(text):
        match = _FIELD.match(text, place)
        depth += 0 if match is None else match.lastgroup == "opened"
        depth -= 0 if match is None else match.lastgroup == "closed"
        if match is None or depth < 0:
            line = text.count("\n", 0, place) + 1
            raise UserError(f"the target {path} is damaged in line {line}: no field of a GpuTargetConfigProto as text")
        place = match.end()
    if depth:
        raise UserError(f"the target {path} is cut short: braces are left open; copy it again")


def has_fp8(device_kind: str) -> bool:
    """Whether a device by its `device_kind` multiplies 8-bit numbers, or is a CPU, where XLA emulates it."""
    return re.search(r"\b(A100|A800|A30|A40|A10G?|A16|A2|V100|T4|P100)\b", device_kind, re.IGNORECASE) is None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its `device_kind`; None for a CPU or a GPU not in the table."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_kind, re.IGNORECASE)), None)

"""Which devices JAX starts with: simulated ones, GPUs, or the CPU alone where there is no driver."""

import contextlib
import ctypes
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

from jaxtron.config import UserError
from jaxtron.quiet import collect_stderr
from jaxtron.runtime.machine import has_driver

# Collectives that do not depend on each other begin in any order on a simulated device, and each holds a thread until
# all have come to it. XLA's pool has a thread a core: on two cores eight devices with a pipeline waited for each other
# for ever, within a minute. This many a device were enough for them.
THREADS_A_DEVICE = 4
# So that few do: otherwise XLA orders instructions for concurrency, and gathers of one group of devices that run at the
# same time are taken for one another (parts of a tick in several branches, JAX 0.11.2).
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# Seconds until XLA ends a process one of whose devices does not come: its own 40 are not enough on a busy machine.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
SIMULATION_FLAGS = f"{IN_ORDER} {PATIENCE}"


def simulate_devices(count: int) -> None:
    """Makes JAX start with `count` CPU devices and no others."""
    if count < 1:
        raise UserError(f"devices {count}: simulate at least one")
    # the XLA flag does the same for the whole machine, and JAX 0.10 refuses to have both
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        found = jax.devices()
        if len(found) != count or found[0].platform != "cpu":
            raise UserError(
                f"devices {count} comes too late: JAX already runs on {len(found)} {found[0].platform} devices; "
                "restart Python and ask for them first"
            ) from None
        return
    jax.config.update("jax_platforms", "cpu")
    if count > 1:
        # the last of a name counts
        flags = f"{SIMULATION_FLAGS} {flags.replace(SIMULATION_FLAGS, '')}"
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS_A_DEVICE * count, os.cpu_count() or 1)))
    os.environ["XLA_FLAGS"] = flags.strip()


def expects_gpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether JAX will start on NVIDIA GPUs: asked for, or left open with a driver and JAX's plugin in place."""
    platforms = jax.config.jax_platforms or environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] in ("cuda", "gpu")
    plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return plugin and has_driver()


def prepare_without_driver() -> None:
    """Keeps JAX from trying and complaining about GPUs, where its CUDA plugin (the extra `plan`) is but no driver."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations if spec else None
    libraries = [path for folder in folders or () for path in Path(folder).glob("xla_cuda*/xla_cuda_plugin.so")]
    if not libraries:
        return
    if not jax.config.jax_platforms and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    # the library complains when it is first loaded, and JAX loads it whatever the platform: be earlier, and quiet
    with collect_stderr(), contextlib.suppress(OSError):
        for library in libraries:
            ctypes.CDLL(str(library))

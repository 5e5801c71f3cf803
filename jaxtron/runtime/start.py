"""What must happen before JAX starts its devices: simulated ones, XLA's flags, and the other processes of the run."""

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax._src import clusters

from jaxtron.config import UserError, expand_home
from jaxtron.gpus import set_pool_fraction
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.machine import find_launcher, has_driver
from jaxtron.runtime.together import join
from jaxtron.runtime.xla_flags import set_xla_flags

# Collectives that do not depend on each other begin in any order on a simulated device, and each holds a thread until
# all have come to it. XLA's pool has a thread a core: on two cores eight devices with a pipeline waited for each other
# for ever, within a minute. This many a device were enough for them.
THREADS_A_DEVICE = 4


def start_runtime(config: RuntimeConfig, *, devices: int | None = None) -> None:
    """Prepares JAX, in the only order that works; call once, before anything asks JAX for a device.

    `devices` simulates that many CPU devices in this process. Raises `UserError` for whatever cannot be had.
    """
    if devices is not None:
        simulate_devices(devices)
    if not has_driver():
        prepare_without_driver()
    set_xla_flags(config, gpu=devices is None and expects_gpu())
    set_pool_fraction()
    if config.compilation_cache is not None:
        _set_compilation_cache(Path(expand_home(config.compilation_cache)))
    initialize_distributed(config)


def start_compiler(config: RuntimeConfig) -> None:
    """Prepares JAX to compile for devices of other machines: on this one it uses the CPU alone, and joins nobody."""
    if not has_driver():
        prepare_without_driver()
    jax.config.update("jax_platforms", "cpu")
    if config.compilation_cache is not None:
        _set_compilation_cache(Path(expand_home(config.compilation_cache)))


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
    os.environ["XLA_FLAGS"] = flags.strip()
    if count > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(THREADS_A_DEVICE * count, os.cpu_count() or 1)))


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
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):
            os.dup2(nowhere.fileno(), 2)
            for library in libraries:
                ctypes.CDLL(str(library))
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def initialize_distributed(config: RuntimeConfig) -> None:
    """Joins the run's other processes: those of the coordinator settings, else of the launcher, else there are none.

    Raises `UserError` where they cannot be joined; exits with one line when they do not all come in time.
    """
    explicit = config.coordinator_address is not None
    launcher = "the coordinator settings" if explicit else find_launcher() if config.launcher == "auto" else None
    if launcher is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX ends a process that waited in vain with a C++ stack trace: be earlier, and clear
    watchdog = threading.Timer(config.connect_seconds, _give_up, (config, launcher))
    watchdog.daemon = True
    watchdog.start()
    try:
        _initialize(config)
    except (RuntimeError, ValueError, ImportError) as error:
        where = f" at {config.coordinator_address}" if explicit else ""
        raise UserError(
            f"cannot join the processes of {launcher}{where}: {str(error).splitlines()[0]} (was JAX used before?)"
        ) from error
    finally:
        watchdog.cancel()


def _initialize(config: RuntimeConfig) -> None:
    found = (config.coordinator_address, config.num_processes, config.process_id, None)
    if config.coordinator_address is None:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, config.connect_seconds
        )
    coordinator, count, process, local_devices = found
    if coordinator is None or process is None:
        raise ValueError("it does not say where process 0 is, or which process this is")
    together = join(
        coordinator,
        process,
        heartbeat_seconds=config.heartbeat_seconds,
        connect_seconds=config.connect_seconds,
    )
    jax.distributed.initialize(
        together.address,
        count,
        process,
        local_devices,
        initialization_timeout=config.connect_seconds + 60,
        # ours come first
        heartbeat_timeout_seconds=max(100, 4 * config.heartbeat_seconds),
        coordinator_bind_address=together.address if process == 0 else None,
    )


def _give_up(config: RuntimeConfig, launcher: str) -> None:
    where = config.coordinator_address or "the coordinator"
    print(
        f"error: the processes of {launcher} did not all reach {where} within {config.connect_seconds} s: start every "
        "one, check that the port is open, or raise runtime.connect_seconds",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _set_compilation_cache(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"runtime.compilation_cache {directory} cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK):
        raise UserError(f"runtime.compilation_cache {directory} cannot be written to")
    jax.config.update("jax_compilation_cache_dir", str(directory))


@contextlib.contextmanager
def out_of_memory_as_user_error(advice: str) -> Iterator[None]:
    """One line, a `UserError` with the advice, where what runs does not fit the devices."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = re.search("out of memory[^.]*", str(error), re.IGNORECASE)
        if reason is None:
            raise
        raise UserError(f"{reason[0]}. {advice}") from None

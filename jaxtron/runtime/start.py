"""JAX started: all that must happen before it has devices, in the only order that works."""

from collections.abc import Collection

import jax

from jaxtron.gpus import set_pool_fraction
from jaxtron.runtime.compilation_cache import set_compilation_cache
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.determinism import set_reductions
from jaxtron.runtime.devices import expects_gpu, prepare_without_driver, simulate_devices
from jaxtron.runtime.distributed import initialize_distributed
from jaxtron.runtime.machine import has_driver
from jaxtron.runtime.xla_flags import set_xla_flags


def start_runtime(config: RuntimeConfig, *, devices: int | None = None, split: Collection[str] = frozenset()) -> None:
    """Prepares JAX; call once, before anything asks JAX for a device.

    `devices` simulates that many CPU devices in this process; `split` are the flags of the mesh that split anything,
    for XLA's own. Raises `UserError` for whatever cannot be had.
    """
    if devices is not None:
        simulate_devices(devices)
    if not has_driver():
        prepare_without_driver()
    gpu = devices is None and expects_gpu()
    set_xla_flags(config, gpu=gpu, split=split)
    if gpu:
        set_reductions(config)
    set_pool_fraction()
    set_compilation_cache(config.compilation_cache)
    initialize_distributed(config)


def start_compiler(config: RuntimeConfig) -> None:
    """Prepares JAX to compile for devices of other machines: on this one it uses the CPU alone, and joins nobody."""
    if not has_driver():
        prepare_without_driver()
    jax.config.update("jax_platforms", "cpu")
    set_compilation_cache(config.compilation_cache)

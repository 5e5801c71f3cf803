"""`jaxtron.simulate`, and JAX started before the first session."""

import math
from collections.abc import Sequence

import jax

from jaxtron.config import UserError
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.devices import simulate_devices
from jaxtron.runtime.machine import has_driver
from jaxtron.runtime.start import start_compiler, start_runtime
from jaxtron.sharding.folding import FLAGS
from jaxtron.typing import Device


class _Start:
    """What this process did: a session started JAX, devices are simulated, or a plan has JAX use the CPU alone."""

    is_done = is_simulated = is_planning = False


def simulate(count: int) -> None:
    """Makes JAX start with `count` CPU devices, to try layouts on any machine; call it before anything uses JAX.

    They share this machine's cores and memory. A second call with the same number does nothing. Raises `UserError`
    where JAX runs on other devices already: restart Python (a notebook: its kernel) and call it first.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"simulate({count!r}): give a whole number of devices above 0, such as simulate(8)")
    simulate_devices(count)
    _Start.is_simulated = True


def start(config: Configuration) -> None:
    """Prepares JAX as the settings say, once a process: compiler flags, its cache of programs, other processes.

    What JAX has started with before stays. With `devices` set that many are simulated, or there are as many already.
    """
    if _Start.is_planning and config.devices is None:
        raise UserError(
            "a plan has started JAX on the CPU alone, and this machine has GPUs: restart Python and make the session "
            "before the plan, or simulate devices first"
        )
    if not _Start.is_done:
        start_runtime(config.runtime, devices=config.devices, split=config.mesh.split)
        _Start.is_done = True
    elif config.devices is not None:
        simulate_devices(config.devices)


def start_planning(config: Configuration, *, devices: int = 0) -> None:
    """Prepares JAX to compile for GPUs that are not there; with at least so many devices here to trace on.

    A `UserError` where JAX runs on fewer already.
    """
    if not _Start.is_done:
        start_compiler(config.runtime)
        _Start.is_planning = has_driver() and not _Start.is_simulated
    # asking for devices starts JAX
    if devices and not (_Start.is_done or _Start.is_simulated and jax.device_count() >= devices):
        simulate(devices)
    if devices and jax.device_count() < devices:
        raise UserError(
            f"a search traces layers on {devices} devices, and JAX runs on {jax.device_count()}: restart Python and "
            f"call jaxtron.simulate({devices}) first"
        )


def devices_for(config: Configuration, devices: Sequence[Device] | None) -> list[Device]:
    """The devices of a session: those given, or all; of a mesh without -1 the first that it needs.

    Raises `UserError` where there are too few.
    """
    found = list(jax.devices() if devices is None else devices)
    if not found:
        raise UserError("devices is empty: give at least one of jax.devices(), or leave it out")
    sizes = [getattr(config.mesh, flag) for flag in FLAGS]
    if devices is None and -1 not in sizes and jax.process_count() == 1:
        found = found[: math.prod(sizes)]
    # the line says what to type here, not on a command line
    config.mesh.shape(len(found), more="restart Python and call jaxtron.simulate first, with")
    return found

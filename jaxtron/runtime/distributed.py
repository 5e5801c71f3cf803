"""The run's other processes, joined before JAX starts its devices."""

import importlib.util
import os
import sys
import threading

import jax

from jaxtron.config import UserError
from jaxtron.interrupts import TRY_AGAIN
from jaxtron.runtime.clusters import detect_cluster
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.machine import find_launcher
from jaxtron.runtime.together import join


def initialize_distributed(config: RuntimeConfig) -> None:
    """Joins the run's other processes: those of the coordinator settings, else of the launcher, else there are none.

    Raises `UserError` where they cannot be joined; exits with one line when they do not all come in time.
    """
    explicit = config.coordinator_address is not None
    launcher = "the coordinator settings" if explicit else find_launcher() if config.launcher == "auto" else None
    if launcher is None:
        return
    if launcher == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "Kubernetes started this process, and JAX asks it for the others by the package kubernetes, which is not "
            "installed: pip install 'jaxtron[kubernetes]', give --runtime.coordinator_address and its siblings, or "
            "run alone with --runtime.launcher none"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # it would take SIGTERM for itself: how a run's processes stop is `common_stop.py`
    jax.config.update("jax_enable_preemption_service", False)
    # JAX ends a process that waited in vain with a C++ stack trace: be earlier, and clear
    watchdog = threading.Timer(config.connect_seconds, _give_up, (config, launcher))
    watchdog.daemon = True
    watchdog.start()
    try:
        _initialize(config)
    except (RuntimeError, ValueError, ImportError) as error:
        where = f" at {config.coordinator_address}" if explicit else ""
        why = str(error).splitlines()[0]
        if error.__cause__ is not None:
            # JAX's clusters try again, and then say that alone
            why += f" ({' '.join(str(error.__cause__).split())[:300]})"
        raise UserError(f"cannot join the processes of {launcher}{where}: {why} (was JAX used before?)") from error
    finally:
        watchdog.cancel()


def _initialize(config: RuntimeConfig) -> None:
    if config.coordinator_address is None:
        coordinator, count, process, local_devices = detect_cluster(config.connect_seconds)
    else:
        coordinator, count, process = config.coordinator_address, config.num_processes, config.process_id
        local_devices = None
    if coordinator is None or process is None:
        raise ValueError("it does not say where process 0 is, or which process this is")
    together = join(
        coordinator,
        process,
        count,
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
    os._exit(TRY_AGAIN)

"""All checks, each for a bounded time, and their report."""

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxtron import interrupts
from jaxtron.data.files.storage import cache_root
from jaxtron.doctor.devices import check_devices, has_devices
from jaxtron.doctor.facts import facts_of
from jaxtron.doctor.finding import Finding, as_json, exit_code, fault, report
from jaxtron.doctor.hosts import Coordinates, check_together
from jaxtron.doctor.limits import check_limits, check_variables
from jaxtron.doctor.places import check_place
from jaxtron.doctor.request import DoctorRequest
from jaxtron.doctor.settings import check_settings, places_of
from jaxtron.doctor.software import check_libraries, check_packages
from jaxtron.doctor.surroundings import Surroundings
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.clusters import detect_cluster
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.machine import find_launcher

# of one check: a file system in trouble may never answer
CHECK_SECONDS = 15.0


def examine(config: Configuration | None, request: DoctorRequest, around: Surroundings | None = None) -> int:
    """Prints what the checks find; 1 where there is a fault. Without a configuration, what of a machine needs none."""
    around = around or Surroundings()
    found = check_machine(config, request, around)
    code = exit_code(found)
    at = coordinates(config.runtime if config is not None else RuntimeConfig(), request.wait, around)
    if isinstance(at, Finding):
        found, code = [*found, at], 1
    elif at is not None:
        facts = facts_of(around, config)
        found, code = check_together(at, around, facts, found)
    if request.json:
        print(json.dumps(as_json(found) | {"ok": not code}, indent=1))
    elif at is None or isinstance(at, Finding) or at.process == 0 or found:
        print("\n".join(report(found)))
    if threading.active_count() > 1 and any(thread.name.startswith("check ") for thread in threading.enumerate()):
        # a check that never ends would keep the process
        interrupts.leave(code)
    return code


def check_machine(config: Configuration | None, request: DoctorRequest, around: Surroundings) -> list[Finding]:
    """What concerns this machine alone."""
    expected = request.gpus
    simulated = config is not None and config.devices is not None
    gpu = has_devices(around) and not simulated and expected != 0
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = []
    if not simulated and expected != 0:
        checks.append(("gpus", lambda: check_devices(around, expected)))
    checks += [
        ("jax", lambda: check_packages(around, gpu=gpu)),
        ("libraries", lambda: check_libraries(around)),
        ("limits", lambda: check_limits(around, gpu=gpu)),
        ("variables", lambda: check_variables(around)),
    ]
    if config is not None:
        checks.append(("settings", lambda: check_settings(config, around)))
        for place in places_of(config, request.name):
            checks.append(("disk", lambda place=place: check_place(place.setting, place.directory, place.needed)))
    else:
        checks.append(("disk", lambda: check_place("data.cache_directory", cache_root(None))))
        checks.append(("disk", lambda: check_place("run.directory", Path("runs"))))
    return [finding for name, check in checks for finding in within(name, check)]


def within(name: str, check: Callable[[], Iterable[Finding]], seconds: float = CHECK_SECONDS) -> list[Finding]:
    """What a check finds, or that it gave no answer or broke."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(check())
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            found.append(fault(name, f"{where}{error.strerror}", "see whether this machine is well"))

    thread = threading.Thread(target=run, name=f"check {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        advice = "a file system may hang: see dmesg and df, or take another machine"
        return [*found, fault(name, f"no answer within {seconds:g} s", advice)]
    return found


def coordinates(config: RuntimeConfig, wait: float, around: Surroundings) -> Coordinates | Finding | None:
    """Where several processes meet: by the settings, or what the launcher says; None for one alone."""
    if config.coordinator_address is not None:
        assert config.num_processes is not None and config.process_id is not None
        port = int(config.coordinator_address.rpartition(":")[2])
        if not 0 < port < 2**16:
            return fault("hosts", f"{config.coordinator_address}: ports go from 1 to 65535", "choose one of those")
        return Coordinates(config.coordinator_address, config.num_processes, config.process_id, wait)
    launcher = find_launcher(around.environment) if config.launcher == "auto" else None
    if launcher is None:
        return None
    try:
        found = detect_cluster(max(1, round(wait)))
    except (RuntimeError, ValueError, ImportError, OSError, KeyError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        return fault("hosts", f"{launcher} does not say who the others are: {why}", "see docs/clusters.md")
    if found.coordinator is None or found.num_processes is None or found.process is None:
        return fault(
            "hosts", f"{launcher} does not say who the others are", "pip install 'jaxtron[kubernetes]' on Kubernetes"
        )
    return Coordinates(found.coordinator, found.num_processes, found.process, wait)

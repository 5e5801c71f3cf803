"""Each start of JAX needs a process of its own, so most of these run small programs."""

import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxtron.config import UserError, load
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.devices import SIMULATION_FLAGS, expects_gpu, simulate_devices
from jaxtron.runtime.distributed import initialize_distributed
from jaxtron.runtime.machine import find_launcher
from jaxtron.runtime.start import start_runtime

PROGRAM = """
import os, sys
from jaxtron.command import run_command
from jaxtron.config import load
from jaxtron.runtime.start import start_runtime
from jaxtron.runtime.config import RuntimeConfig

def main(argv):
    devices, *flags = argv
    start_runtime(load(RuntimeConfig, None, flags), devices=int(devices) if devices != "none" else None)
    import jax
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    total = jax.jit(jax.shard_map(
        lambda: jax.lax.psum(1 + jax.lax.axis_index("all"), "all"), mesh=mesh, in_specs=(), out_specs=P()))
    counts = jax.process_count(), len(jax.local_devices()), jax.device_count()
    print("result:", *counts, int(total()), os.environ.get("XLA_FLAGS"))

sys.exit(run_command(main))
"""


def start(devices: int | None, *flags: str, xla_flags: str = "", platform: str = "cpu") -> subprocess.Popen[str]:
    """A process that starts JAX and sums over its devices."""
    environment = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": platform}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(devices).lower(), *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, result and error line."""
    out, err = process.communicate(timeout=60)
    # gloo writes lines of its own in between
    return process.returncode, "".join(re.findall("result: (.*)", out)), "".join(re.findall("error: .*", err))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_simulated_devices_replace_an_inherited_count_and_platform():
    process = start(3, xla_flags="--xla_force_host_platform_device_count=8", platform="cuda")
    assert finish(process) == (0, f"1 3 3 6 {SIMULATION_FLAGS}", "")


def test_simulating_again_is_fine_and_other_counts_are_too_late():
    assert jax.device_count() == 8
    simulate_devices(8)
    with pytest.raises(UserError, match="devices 4 comes too late: JAX already runs on 8 cpu devices"):
        simulate_devices(4)
    with pytest.raises(UserError, match="at least one"):
        simulate_devices(0)


def test_two_processes_with_two_devices_each():
    address = f"127.0.0.1:{free_port()}"
    coordinates = ["--coordinator_address", address, "--num_processes", "2"]
    processes = [start(2, *coordinates, "--process_id", str(i)) for i in range(2)]
    assert [finish(process) for process in processes] == [(0, f"2 2 4 10 {SIMULATION_FLAGS}", "")] * 2


def test_a_process_that_waits_in_vain_ends_with_one_line():
    address = f"127.0.0.1:{free_port()}"
    coordinates = ["--coordinator_address", address, "--num_processes", "2", "--connect_seconds", "1"]
    code, _, error = finish(start(None, *coordinates, "--process_id", "0"))
    assert code == 75 and f"did not all reach {address} within 1 s" in error


def test_a_port_in_use_is_one_line():
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        process = start(None, "--coordinator_address", address, "--num_processes", "1", "--process_id", "0")
        code, _, error = finish(process)
    assert code == 2 and f"coordinator_address {address}: process 0 cannot listen on port" in error


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_that_no_machine_has_is_one_line(port):
    with pytest.raises(UserError, match=f"node:{port}: ports go from 1 to 65535, and {port} is none"):
        initialize_distributed(RuntimeConfig(coordinator_address=f"node:{port}", num_processes=1, process_id=0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_processes 2", "runtime.coordinator_address and runtime.process_id missing"),
        ("--coordinator_address node1 --num_processes 2 --process_id 0", "'node1' is not host:port"),
        (
            "--coordinator_address a:1 --num_processes 2 --process_id 2",
            "runtime.process_id 2 is not below runtime.num_processes 2",
        ),
        ("--xla_flags=xla_a=1", "'xla_a=1' does not begin with --"),
        ("--xla_flags=--xla_a='1", "does not read: No closing quotation"),
    ],
)
def test_settings_that_do_not_fit(flags: str, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        load(RuntimeConfig, None, flags.split())


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, "Slurm"),
        # srun --pty in an allocation of 8 tasks, and a batch script without srun
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_launchers(environment: dict[str, str], launcher: str | None):
    assert find_launcher(environment) == launcher


def test_slurm_gives_the_coordinates(monkeypatch: pytest.MonkeyPatch):
    seen = {}

    def join(coordinator: str, process: int, num_processes: int, **settings: float) -> SimpleNamespace:
        seen.update(coordinator=coordinator, process=process, num_processes=num_processes, **settings)
        return SimpleNamespace(address="127.0.0.1:5")

    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: seen.update(arguments=a, **k))
    monkeypatch.setattr("jaxtron.runtime.distributed.join", join)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    for name, value in {**slurm, "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    start_runtime(RuntimeConfig(launcher="none"))
    assert not seen
    start_runtime(RuntimeConfig(connect_seconds=5, heartbeat_seconds=40))
    # JAX reaches process 0 by what tells of its loss, and its own heartbeats come later than ours
    assert seen["coordinator"].startswith("n1:") and seen["process"] == 1 and seen["num_processes"] == 2
    assert seen["heartbeat_seconds"] == 40
    assert seen["arguments"] == ("127.0.0.1:5", 2, 1, [1]) and seen["initialization_timeout"] > 5
    assert seen["heartbeat_timeout_seconds"] > 40 and seen["coordinator_bind_address"] is None


def test_kubernetes_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxtron\[kubernetes\]'"):
        initialize_distributed(RuntimeConfig())


def test_the_cause_of_what_a_cluster_tries_again_is_told(monkeypatch: pytest.MonkeyPatch):
    def detect(seconds: int):
        raise RuntimeError("Retry failed with all attempts exhausted") from ValueError("403\nForbidden")

    monkeypatch.setattr("jaxtron.runtime.distributed.detect_cluster", detect)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"of Open MPI: Retry failed with all attempts exhausted \(403 Forbidden\)"):
        initialize_distributed(RuntimeConfig())


def test_platform(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxtron.runtime.devices.jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=None)))
    assert expects_gpu({"JAX_PLATFORMS": "cuda,cpu"})
    assert not expects_gpu({"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "jax_cuda13_plugin" else None)
    assert expects_gpu({})
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert not expects_gpu({})


def test_a_valid_flag_reaches_xla_after_the_inherited_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process = start(2, "--xla_flags=--xla_cpu_enable_fast_math=false", xla_flags="--xla_cpu_use_thunk_runtime=true")
    expected = f"1 2 2 3 {SIMULATION_FLAGS} --xla_cpu_use_thunk_runtime=true --xla_cpu_enable_fast_math=false"
    assert finish(process) == (0, expected, "")


def test_compilation_cache(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="runtime.compilation_cache .* cannot be made"):
        start_runtime(RuntimeConfig(compilation_cache=str(tmp_path / "file" / "cache")))
    before = jax.config.jax_compilation_cache_dir
    try:
        start_runtime(RuntimeConfig(compilation_cache=str(tmp_path / "cache")))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

"""Compile-only GPUs: devices, memory, and the errors of a missing plugin."""

import importlib.metadata
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.config import UserError
from jaxtron.gpus import GPUS, gpu_named, peak_flops
from jaxtron.plan.compiled.deviceless import Memory, gpu_devices, memory


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_can_be_compiled_for(name):
    mesh = Mesh(np.array(gpu_devices(name, 2)), ("data",))
    assert mesh.devices.flat[0].device_kind == GPUS[name].device_kind
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    assert "ENTRY" in jax.jit(lambda x: x @ x.T).lower(x).compile().as_text()


def test_nodes_and_simulated_cpu_devices_side_by_side():
    devices = gpu_devices("h100", 1024)
    assert len(devices) == 1024
    assert len({device.process_index for device in devices}) == 128
    assert jax.devices()[0].platform == "cpu"
    assert float(jax.jit(lambda x: x + 1)(1.0)) == 2.0


def test_same_devices_every_time():
    first, second = gpu_devices("h100", 8), gpu_devices("H100", 8)
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_memory_counts_donated_arguments_once():
    mesh = Mesh(np.array(gpu_devices("h100", 8)), ("data",))
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    kept = memory(jax.jit(lambda x: x + 1).lower(x).compile())
    donated = memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert (kept.arguments, kept.outputs, kept.aliases) == (4096, 4096, 0)
    assert (donated.arguments, donated.outputs, donated.aliases) == (4096, 4096, 4096)
    assert kept.peak - donated.peak == 4096


def test_peak_adds_temporaries():
    assert Memory(arguments=10, outputs=7, aliases=5, temporaries=3).peak == 15


def test_registers_the_plugin_that_jax_gave_up():
    """Without JAX_PLATFORMS=cpu JAX drops a plugin whose CUDA libraries are missing."""
    code = (
        "import jax; jax.devices()\n"
        "from jaxtron.plan.compiled.deviceless import gpu_devices\n"
        "print(gpu_devices('h200', 4)[0].device_kind, jax.devices()[0].platform)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("NVIDIA H200 ")


@pytest.mark.parametrize(
    ("count", "per_node", "message"), [(12, 8, "12 GPUs do not fill nodes of 8"), (0, 8, "at least 1")]
)
def test_impossible_counts(count, per_node, message):
    with pytest.raises(UserError, match=message):
        gpu_devices("h100", count, per_node)


def test_unknown_gpu_lists_the_known():
    with pytest.raises(UserError, match="unknown GPU 'tpu': known are a100, h100, h200, b200, gb200"):
        gpu_devices("tpu", 8)


def test_missing_plugin_names_the_command(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=f"pip install jax-cuda12-plugin=={jax.__version__}"):
        gpu_devices("h100", 8)


def test_plugin_of_another_version_names_both(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.4.1")
    with pytest.raises(UserError, match=f"CUDA plugin of JAX {jax.__version__}, not .* 0.4.1.*pip install"):
        gpu_devices("h100", 8)


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 3090", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_kind(device_kind, teraflops):
    assert peak_flops(device_kind) == (None if teraflops is None else teraflops * 1e12)


def test_peak_of_every_known_gpu_is_found_by_its_own_name():
    assert {peak_flops(gpu.device_kind) == gpu.peak_flops for gpu in GPUS.values()} == {True}
    assert gpu_named("GB200").name == "gb200"

"""A small training state with every kind of leaf, and what compares two of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxtron
from tests.support.compiling import QUICK


def make_mesh(axis: str, num_devices: int) -> Mesh:
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), (axis,), axis_types=(AxisType.Explicit,), devices=devices)


def sharding_of(leaf, mesh: Mesh) -> NamedSharding:
    """The first dimension that the mesh divides is split over it."""
    (axis,) = mesh.axis_names
    spec = [None] * leaf.ndim
    divisible = [dim for dim, size in enumerate(leaf.shape) if size % mesh.size == 0]
    if divisible:
        # different dimensions on different meshes
        spec[divisible[-1 if axis == "tensor" else 0]] = axis
    return NamedSharding(mesh, P(*spec))


@pytest.fixture
def make_state() -> Callable:
    """`make_state(mesh, seed)` is a model's parameters, AdamW's state, PRNG keys and a step."""

    def make(mesh: Mesh, seed: int = 0):
        key = jax.random.key(seed)
        parameters = {
            "embed": jax.random.normal(key, (64, 32)),
            "layers": [{"kernel": jax.random.normal(key, (32, 16)).astype(jnp.bfloat16), "bias": jnp.arange(3.0)}],
        }
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))
        state = {
            "parameters": parameters,
            "optimizer": optimizer.update(parameters, optimizer.init(parameters), parameters)[1],
            "key": key,
            "keys": jax.random.split(key, 8),
            "step": jnp.int32(seed),
        }
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding_of(leaf, mesh)), state)

    return make


@pytest.fixture
def abstract() -> Callable:
    """`abstract(state, mesh)` is the state's shapes and dtypes, sharded over another mesh."""

    def make(state, mesh: Mesh):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf, mesh)), state
        )

    return make


@pytest.fixture
def data_mesh() -> Mesh:
    return make_mesh("data", 8)


@pytest.fixture
def odd_mesh() -> Mesh:
    return make_mesh("data", 3)


@pytest.fixture
def tensor_mesh() -> Mesh:
    return make_mesh("tensor", 8)


@pytest.fixture
def one_device() -> Mesh:
    return make_mesh("data", 1)


@pytest.fixture
def assert_same() -> Callable:
    """`assert_same(state, expected)`: same tree, dtypes and bits."""

    def check(state, expected):
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert leaf.dtype == other.dtype and leaf.shape == other.shape
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
            assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()

    return check


@pytest.fixture
def start_script() -> Callable[..., subprocess.Popen[str]]:
    """`start_script(name, *arguments, devices=1)` runs a script of this directory in a process of its own."""

    def start(name: str, *arguments: object, devices: int = 1) -> subprocess.Popen[str]:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(Path(jaxtron.__file__).parents[1]),
        }
        command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
        )

    return start

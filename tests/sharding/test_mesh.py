"""The mesh: its order, what fills it, and what does not fit."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxtron.config import UserError, load
from jaxtron.sharding.config import MeshConfig
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.mesh import build_mesh


def test_axes_go_from_least_to_most_communication():
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()).mesh
    assert mesh.axis_names == FLAGS == ("pipe", "data", "fsdp", "context", "tensor")
    assert dict(mesh.shape) == {"pipe": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    # devices in their given order: neighbours share tensor, then fsdp
    np.testing.assert_array_equal(mesh.devices.ravel(), jax.devices())
    assert list(mesh.devices[0, 0, 0, 0]) == jax.devices()[:2]
    assert list(mesh.devices[0, 1, :, 0, 0]) == [jax.devices()[4], jax.devices()[6]]
    # stages are farthest apart
    mesh = build_mesh(MeshConfig(pipe=2, data=2, tensor=2), jax.devices()).mesh
    assert list(mesh.devices[:, 0, 0, 0, 0]) == [jax.devices()[0], jax.devices()[4]]


def test_axes_lie_in_the_order_that_is_asked_for():
    order = ("pipe", "data", "context", "fsdp", "tensor")
    folding = build_mesh(MeshConfig(data=1, context=2, fsdp=4, order=order), jax.devices())
    assert folding.mesh.axis_names == order
    assert list(folding.sizes.items()) == [("pipe", 1), ("data", 1), ("context", 2), ("fsdp", 4), ("tensor", 1)]
    # neighbours share fsdp
    assert list(folding.mesh.devices[0, 0, 0, :, 0]) == jax.devices()[:4]
    assert (folding.axes("fsdp", "context"), folding.manual) == (("fsdp", "context"), order[:4])
    # stages and tensor may lie anywhere too
    order = ("tensor", "data", "fsdp", "context", "pipe")
    folding = build_mesh(MeshConfig(pipe=2, data=2, tensor=2, order=order), jax.devices())
    assert folding.mesh.devices[:, 0, 0, 0, 0].tolist() == [jax.devices()[0], jax.devices()[4]]
    assert folding.mesh.devices[0, 0, 0, 0].tolist() == jax.devices()[:2]
    assert folding.manual == order[1:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--order pipe data context fsdp",
            "mesh.order .pipe, data, context, fsdp. must have each of pipe, data, fsdp,",
        ),
        ("--order pipe data data fsdp tensor", "must have each of pipe, data, fsdp, context, tensor once"),
        ("--order pipe data context fsdp expert", "order"),
        # what moves has one part
        (
            "--data 1 --fsdp 8 --order pipe data context fsdp tensor",
            "mesh.order .* has no effect with mesh.context 1: leave it out",
        ),
        ("--data 8 --order fsdp context tensor data pipe", "with mesh.pipe 1 and mesh.fsdp 1 and mesh.context 1 and"),
    ],
)
def test_orders_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message) as error:
        load(MeshConfig, None, flags.split())
    assert "\n" not in str(error.value)
    # an open size may be any
    assert load(MeshConfig, None, "--data 1 --fsdp 8 --context -1 --order pipe data context fsdp tensor".split())


@pytest.mark.parametrize(
    ("config", "num_devices", "filled"),
    [
        ({}, 8, {"data": 8}),
        ({"tensor": 4}, 8, {"data": 2, "tensor": 4}),
        ({"data": 2, "fsdp": -1}, 8, {"data": 2, "fsdp": 4}),
        ({"data": 1, "tensor": -1}, 8, {"tensor": 8}),
        ({"data": 3, "fsdp": 2}, 6, {"data": 3, "fsdp": 2}),
        ({"pipe": 4}, 8, {"pipe": 4, "data": 2}),
        ({"pipe": -1, "data": 1, "tensor": 2}, 8, {"pipe": 4, "tensor": 2}),
        ({}, 1, {}),
    ],
)
def test_minus_one_fills(config, num_devices, filled):
    sizes = MeshConfig(**config).shape(num_devices)
    assert list(sizes) == list(FLAGS)
    assert {axis: size for axis, size in sizes.items() if size > 1} == filled


@pytest.mark.parametrize(
    ("config", "num_devices", "message"),
    [
        ({"data": 4}, 8, "data 4 needs 4 devices, there are 8"),
        ({"data": 2, "tensor": 8}, 8, "mesh.data 2 x mesh.tensor 8 needs 16 devices, there are 8"),
        ({"tensor": 3}, 8, "mesh.data -1 x mesh.tensor 3 needs a multiple of 3 devices, there are 8"),
        ({"data": 1}, 8, "data 1 needs 1 device, there are 8"),
        ({"pipe": 3}, 8, "mesh.pipe 3 x mesh.data -1 needs a multiple of 3 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_devices(config, num_devices, message):
    with pytest.raises(UserError, match=message) as error:
        MeshConfig(**config).shape(num_devices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor", "0"], "mesh.tensor must be a positive number or -1, not 0"),
        (["--fsdp", "-2"], "mesh.fsdp must be a positive number or -1, not -2"),
        (["--tensor", "-1"], "only one mesh axis can be -1 .*mesh.data, mesh.tensor"),
        (["--pipe", "0"], "mesh.pipe must be a positive number or -1, not 0"),
        (["--pipe", "-1"], "only one mesh axis can be -1 .*mesh.pipe, mesh.data"),
        (["--tensor_parallel", "4"], "unknown setting tensor_parallel.*tensor"),
    ],
)
def test_sizes_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message) as error:
        load(MeshConfig, None, flags)
    assert "\n" not in str(error.value)

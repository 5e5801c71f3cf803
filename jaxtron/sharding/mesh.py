"""The mesh: five named axes over the devices, ordered from least to most communication."""

import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import AxisType, Mesh
from pydantic import model_validator

from jaxtron.config import Config, UserError
from jaxtron.typing import Device

AXES = ("pipe", "data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
# those that may share a parameter and its state: gradients are summed over them
SHARD_AXES = (*BATCH_AXES, "context")
MANUAL_AXES = ("pipe", "data", "fsdp", "context")


class MeshConfig(Config):
    """Devices along each axis of the mesh; the product is the number of devices, and one `-1` fills it."""

    data: int = -1
    """Replicas of the model, each on its own part of the batch (`-1`: as many as fit)."""
    fsdp: int = 1
    """Parts of every parameter, gathered where it is used; splits the batch too."""
    tensor: int = 1
    """Parts of every layer's heads, MLP width and vocabulary; the sequence is split between them."""
    pipe: int = 1
    """Pipeline stages, each with its part of the layers."""
    context: int = 1
    """Parts of every sequence, each on its own devices; attention sees the others (settings: context)."""

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis} must be a positive number or -1, not {size}")
        if list(sizes.values()).count(-1) > 1:
            filled = ", ".join(f"mesh.{axis}" for axis, size in sizes.items() if size == -1)
            raise ValueError(f"only one mesh axis can be -1 (fill), not {filled}")
        return self

    def shape(self, num_devices: int) -> dict[str, int]:
        """Sizes by axis with `-1` filled; a `UserError` if they do not multiply to `num_devices`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        text = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "data 1"
        if -1 in sizes.values():
            if num_devices % known:
                raise UserError(f"mesh {text}: {known} does not divide the {num_devices} devices")
            sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
        elif known != num_devices:
            raise UserError(
                f"mesh {text} needs {known} devices, there are {num_devices}; "
                "change the mesh, set one axis to -1, or simulate them with --devices"
            )
        return sizes


def build_mesh(config: MeshConfig, devices: Sequence[Device]) -> Mesh:
    """The mesh over `devices` in their given order, all axes `Explicit`; `tensor` takes neighbours."""
    sizes = config.shape(len(devices))
    grid = np.array(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))

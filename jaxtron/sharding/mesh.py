"""The mesh: five named axes over the devices, ordered from least to most communication."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import AxisType, Mesh

from jaxtron.sharding.config import AXES, MeshConfig
from jaxtron.typing import Device


def build_mesh(config: MeshConfig, devices: Sequence[Device]) -> Mesh:
    """The mesh over `devices` in their given order, all axes `Explicit`; `tensor` takes neighbours."""
    sizes = config.shape(len(devices))
    grid = np.array(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))

"""The mesh over the devices, ordered from least to most communication or as `mesh.order` says, and which of its axes a
flag has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxtron.sharding.config import MeshConfig
from jaxtron.sharding.folding import FLAGS, Axes, Refinement
from jaxtron.typing import Device


@dataclass(frozen=True)
class Folding:
    """A mesh, and the axes of every flag of its two views (`folding.py`); one without devices tells sizes alone."""

    mesh: Mesh | AbstractMesh
    flags: Mapping[str, Axes]

    def axes(self, *flags: str) -> Axes:
        """The mesh axes of these flags, in their order."""
        return tuple(axis for flag in flags for axis in self.flags[flag])

    def size(self, axes: Axes) -> int:
        """Number of parts that these mesh axes make."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def manual(self) -> Axes:
        """The axes that are manual in a region: all but those of `tensor`."""
        return tuple(axis for axis in self.mesh.axis_names if axis not in self.flags["tensor"])

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by flag of the layers' view, outermost first."""
        return {flag: self.size(axes) for flag, axes in self.flags.items() if flag in FLAGS}

    def names(self, axes: Axes) -> Axes:
        """What people call these mesh axes: the flags that they make up, and the axes that make up none."""
        rest, found = [axis for axis in axes if self.mesh.shape[axis] > 1], []
        while rest:
            fits = (flag for flag, own in self.flags.items() if rest[0] in own and {*own} <= {*rest})
            # the layers' view is first
            flag = next(fits, None)
            found.append(rest[0] if flag is None else flag)
            rest = [axis for axis in rest[1:] if flag is None or axis not in self.flags[flag]]
        return tuple(found)

    def named(self, names: Axes) -> Axes:
        """The mesh axes of what `names` calls them."""
        return tuple(axis for name in names for axis in self.flags.get(name, (name,)))

    def without(self, flag: str) -> "Folding":
        """The same mesh with nothing split over `flag`: devices along it are copies."""
        assert flag != "tensor", "what is not of tensor is manual"
        return replace(self, flags={**self.flags, flag: ()})


def build_mesh(config: MeshConfig, devices: Sequence[Device]) -> Folding:
    """The mesh over `devices` in their given order, all axes `Explicit`; the innermost flag takes neighbours."""
    sizes, flags = _refined(config, len(devices))
    grid = np.array(devices).reshape(list(sizes.values()))
    return Folding(Mesh(grid, tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes)), flags)


def abstract_mesh(config: MeshConfig, num_devices: int) -> Folding:
    """As `build_mesh`, of so many devices that are not there."""
    sizes, flags = _refined(config, num_devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))
    return Folding(mesh, flags)


def _refined(config: MeshConfig, num_devices: int) -> Refinement:
    return config.refined(config.shape(num_devices))

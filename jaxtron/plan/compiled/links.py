"""Which wires a communication crosses: those inside a node, or the network between nodes."""

from typing import Literal

import jax
import numpy as np

from jaxtron.plan.compiled.census import part_of

Link = Literal["NVLink", "network"]


def link(mesh: jax.sharding.Mesh, axes: tuple[str, ...], gpus_per_node: int) -> Link | None:
    """The slowest link between devices that differ in these mesh axes; None where no data leaves a device.

    Devices fill the nodes in the mesh's order. Axes that are not the mesh's ("?") count as crossing nodes.
    """
    if not axes:
        return None
    parts = [part_of(axis) for axis in axes]
    if not {name for name, _ in parts} <= set(mesh.axis_names):
        return "network"
    nodes = (np.arange(mesh.size) // gpus_per_node).reshape(tuple(mesh.shape.values()))
    along = tuple(mesh.axis_names.index(name) for name, _ in parts)
    if count := parts[0][1]:
        nodes, along = np.moveaxis(nodes, along[0], -1).reshape(-1, count), (1,)
    return "NVLink" if (nodes.max(along) == nodes.min(along)).all() else "network"

"""Which wires a communication crosses: those inside a node, or the network between nodes."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from jaxtron.plan.compiled.census import part_of

Link = Literal["NVLink", "network"]


def link(sizes: Mapping[str, int], axes: tuple[str, ...], gpus_per_node: int) -> Link | None:
    """The slowest link between devices that differ along these axes; None where no data leaves a device.

    `sizes` are those of the mesh, outermost first; devices fill the nodes in its order. What is no axis of it ("?")
    counts as crossing nodes.
    """
    if not axes:
        return None
    parts = [part_of(axis) for axis in axes]
    if not {name for name, _ in parts} <= set(sizes):
        return "network"
    nodes = (np.arange(math.prod(sizes.values())) // gpus_per_node).reshape(tuple(sizes.values()))
    along = tuple(list(sizes).index(name) for name, _ in parts)
    if count := parts[0][1]:
        nodes, along = np.moveaxis(nodes, along[0], -1).reshape(-1, count), (1,)
    return "NVLink" if (nodes.max(along) == nodes.min(along)).all() else "network"

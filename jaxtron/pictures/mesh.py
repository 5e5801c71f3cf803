"""The mesh on nodes: for each of its axes, which devices talk to each other, and whether they share a node."""

import math
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from jaxtron.config import UserError
from jaxtron.pictures.grid import MOST_NUMBERS, axes_text, mesh_sizes
from jaxtron.pictures.picture import INK, MUTED, PALE, Picture, bare, colors, ink_on, numbers_text
from jaxtron.words import plural

# with more devices only the group of one is in colour
MOST_COLORED = 64
_FAINT, _OWN, _NODE, _NEAR = "#d6d6d6", "#d55e00", "#f4f4f4", "#f7b98a"


def mesh(mesh: Any, *, gpus_per_node: int = 8, device: int = 0, title: str = "") -> Picture:
    """The devices in their nodes, once for each axis of the mesh: those of one colour differ along that axis alone.

    They are what communicates with each other along it: inside a node over NVLink, or across nodes over the network.
    Of many devices only the group of `device` is in colour, its nodes paler. `mesh` is a JAX mesh or sizes by axis,
    outermost first; devices fill nodes in its order. Raises `UserError` for what is no mesh, or a device not in it.
    """
    sizes = mesh_sizes(mesh)
    count = math.prod(sizes.values())
    if isinstance(gpus_per_node, bool) or not isinstance(gpus_per_node, int) or gpus_per_node < 1:
        raise UserError(f"gpus_per_node is {gpus_per_node!r}: give a whole number above 0")
    if isinstance(device, bool) or not isinstance(device, int) or not 0 <= device < count:
        raise UserError(f"device {device!r} is not in the mesh: it has 0 to {count - 1:,}")
    shown = [axis for axis, size in sizes.items() if size > 1] or [next(iter(sizes))]
    corners, nodes = _cells(count, gpus_per_node)
    wide, high = nodes[:, 0].max() + _node_width(gpus_per_node), nodes[:, 1].max() + _node_height(gpus_per_node)
    columns = min(len(shown), 1 if wide > 4 * high else 2 if len(shown) == 4 else 3)
    rows = -(-len(shown) // columns)
    panel = 3.6 if count <= 32 else 4.6
    picture = Picture(max(5.0, panel * columns), 0.6 + rows * (0.75 + panel * high / wide))
    boxes = list(picture.subplots(rows, columns, squeeze=False).flat)
    for box, axis in zip(boxes, shown, strict=False):
        _draw_axis(box, sizes, axis, corners, nodes, gpus_per_node, device)
    for box in boxes[len(shown) :]:
        box.set_visible(False)
    where = f"{plural(count, 'device')} in {plural(-(-count // gpus_per_node), 'node')} of {gpus_per_node}"
    head = f"{title}: {axes_text(sizes)}" if title else axes_text(sizes)
    picture.suptitle(f"{head}, {where}", fontsize=10, color=INK)
    return picture


Link = Literal["NVLink", "network"]


def groups(sizes: dict[str, int], axis: str) -> np.ndarray:
    """The devices of each group along an axis, a row each, in the mesh's order."""
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return np.moveaxis(grid, list(sizes).index(axis), -1).reshape(-1, sizes[axis])


def link_of(sizes: dict[str, int], axis: str, gpus_per_node: int) -> Link:
    """The slowest link that devices of some group along an axis need."""
    nodes = groups(sizes, axis) // gpus_per_node
    return "NVLink" if (nodes == nodes[:, :1]).all() else "network"


def _draw_axis(
    axes: Axes,
    sizes: dict[str, int],
    axis: str,
    corners: np.ndarray,
    nodes: np.ndarray,
    gpus_per_node: int,
    device: int,
) -> None:
    found, count = groups(sizes, axis), len(corners)
    own = next(row for row in found if device in row)
    fills = np.full(count, _FAINT, dtype=object)
    if count <= MOST_COLORED and len(found) > 1:
        for row, color in zip(found, colors(len(found)), strict=True):
            fills[row] = color
    else:
        fills[own] = _OWN
    right, bottom = _node_width(gpus_per_node) + 0.05, _node_height(gpus_per_node) + 0.05
    box = np.array([(-0.15, -0.15), (right, -0.15), (right, bottom), (-0.15, bottom)])
    backs = np.full(len(nodes), _NODE, dtype=object)
    if fills[own[0]] == _OWN:
        backs[np.unique(own // gpus_per_node)] = _NEAR
    axes.add_collection(
        PolyCollection(list(nodes[:, None] + box), facecolors=list(backs), edgecolors=PALE, linewidths=0.6)
    )
    cell = np.array([(0, 0), (0.9, 0), (0.9, 0.9), (0, 0.9)])
    axes.add_collection(PolyCollection(list(corners[:, None] + cell), facecolors=list(fills), edgecolors="none"))
    if count <= MOST_NUMBERS:
        for number, ((left, top), fill) in enumerate(zip(corners, fills, strict=True)):
            middle = (left + 0.45, top + 0.45)
            axes.text(*middle, str(number), ha="center", va="center", fontsize=6.5, color=ink_on(fill))
    far = np.unique(own // gpus_per_node)
    where = "inside a node: NVLink" if len(far) == 1 else f"over {len(far):,} nodes: network"
    bare(axes, aspect="equal")
    axes.autoscale_view()
    axes.invert_yaxis()
    axes.set_title(f"{axis} {sizes[axis]:,}, {where}", fontsize=9, color=INK)
    axes.set_xlabel(f"with device {device}: {numbers_text(own.tolist(), 48)}", fontsize=8, color=MUTED)


def _columns(gpus_per_node: int) -> int:
    """Of the cells of a node: two rows of four for eight."""
    divisors = [count for count in range(1, gpus_per_node + 1) if gpus_per_node % count == 0]
    return next(count for count in divisors if count * count >= 1.4 * gpus_per_node or count == gpus_per_node)


def _node_width(gpus_per_node: int) -> float:
    return float(min(_columns(gpus_per_node), gpus_per_node))


def _node_height(gpus_per_node: int) -> float:
    return float(-(-gpus_per_node // _columns(gpus_per_node)))


def _cells(count: int, gpus_per_node: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper left corner of each device's cell and of each node's, nodes in rows that fill a page."""
    width, height = _node_width(gpus_per_node) + 0.6, _node_height(gpus_per_node) + 0.6
    num_nodes = -(-count // gpus_per_node)
    ideal = math.sqrt(1.5 * num_nodes * height / width)
    divisors = [count for count in range(1, num_nodes + 1) if num_nodes % count == 0]
    across = min(divisors, key=lambda count: abs(math.log(count / ideal)))
    # a prime number of nodes has no whole rows
    across = across if 0.4 < across / ideal < 2.5 else max(1, round(ideal))
    places = np.arange(num_nodes)
    nodes = np.stack([places % across * width, places // across * height], -1)
    inside = np.arange(count) % gpus_per_node
    columns = _columns(gpus_per_node)
    cells = nodes[np.arange(count) // gpus_per_node] + np.stack([inside % columns, inside // columns], -1)
    return cells.astype(float), nodes.astype(float)

"""What devices send each other in a step, as a matrix: inside nodes (NVLink) and between them (network)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import matplotlib
import numpy as np
from jaxtyping import Bool, Float64
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import MaxNLocator

from jaxtron.config import UserError
from jaxtron.pictures.grid import axes_text, mesh_sizes
from jaxtron.pictures.picture import INK, MUTED, Picture
from jaxtron.words import plural, readable_bytes

Pattern = Literal["ring", "all", "neighbours"]
# more rows than these are not told apart: nodes, or groups of them, are drawn instead of devices
MOST_ROWS = 512
_SHADES = {"NVLink": "Blues", "network": "Oranges"}


@dataclass(frozen=True)
class Flow:
    """Communication of a step among devices that differ along `axes`: each sends `bytes` in all.

    To whom: "ring", to the next of its group, as gathers, scatters and reductions pass data on, over nodes in several
    rings so that each device has its share of the network; "all", to each of the
    group alike (all-to-all); "neighbours", half to the next and half to the one before (pipeline messages). With
    `group` only so many neighbours along the one axis form a group.
    """

    axes: tuple[str, ...]
    bytes: float
    pattern: Pattern = "ring"
    group: int | None = None


@dataclass(frozen=True)
class TrafficMatrix:
    """`bytes[i, j]` is what devices of row i send to those of column j in a step; a row has `devices` each.

    `inside` marks what stays in nodes, over NVLink.
    """

    bytes: Float64[np.ndarray, "N N"]
    inside: Bool[np.ndarray, "N N"]
    devices: int
    nvlink: float
    """Bytes that all devices send inside nodes."""
    network: float
    """And to other nodes."""


def traffic_matrix(
    mesh: Any, flows: Iterable[Flow], *, gpus_per_node: int = 8, most_rows: int = MOST_ROWS
) -> TrafficMatrix:
    """The sum of flows by sender and receiver; of more devices than `most_rows` a row is a node, or several."""
    sizes = mesh_sizes(mesh)
    if isinstance(gpus_per_node, bool) or not isinstance(gpus_per_node, int) or gpus_per_node < 1:
        raise UserError(f"gpus_per_node is {gpus_per_node!r}: give a whole number above 0")
    count = math.prod(sizes.values())
    each = 1
    while -(-count // each) > most_rows:
        each = gpus_per_node if each == 1 else each * 2
    rows = -(-count // each)
    found, between = np.zeros((rows, rows)), 0.0
    total = 0.0
    for flow in flows:
        for senders, receivers, size in _pairs(flow, sizes, count, gpus_per_node):
            np.add.at(found, (senders // each, receivers // each), size)
            total += size * len(senders)
            between += size * np.count_nonzero(senders // gpus_per_node != receivers // gpus_per_node)
    nodes = np.arange(rows) * each // gpus_per_node
    inside = nodes[:, None] == nodes[None] if each <= gpus_per_node else np.eye(rows, dtype=bool)
    return TrafficMatrix(found, inside, each, total - between, between)


def traffic(
    mesh: Any, flows: Iterable[Flow], *, gpus_per_node: int = 8, title: str = "", most_rows: int = MOST_ROWS
) -> Picture:
    """Bytes of a step from each device (rows) to each (columns): blue over NVLink, orange over the network.

    Shades are logarithmic. Lines are the ends of nodes. Of many devices a row is a node, or several. Which device sends
    to which is an assumption where a collective has its way: rings in the mesh's order, as many as devices in a node.
    `mesh` is a JAX mesh or sizes by axis, outermost first; devices fill nodes in its order. Raises `UserError` for
    flows along axes that the mesh does not have.
    """
    sizes = mesh_sizes(mesh)
    found = traffic_matrix(sizes, flows, gpus_per_node=gpus_per_node, most_rows=most_rows)
    rows = len(found.bytes)
    picture = Picture(7.0, 8.4)
    axes = picture.subplots()
    axes.set_facecolor("white")
    for link, mask in (("NVLink", found.inside), ("network", ~found.inside)):
        own = np.where(mask & (found.bytes > 0), found.bytes, np.nan)
        if np.isnan(own).all():
            continue
        low, high = float(np.nanmin(own)), float(np.nanmax(own))
        shades = ListedColormap(matplotlib.colormaps[_SHADES[link]](np.linspace(0.45, 0.9, 256)))
        wide = LogNorm(low, high) if low < high else LogNorm(low * 0.8, low * 1.25)
        image = axes.imshow(own, cmap=shades, norm=wide, zorder=2)
        if found.devices > gpus_per_node and link == "NVLink":
            link = "inside these groups"
        bar = picture.colorbar(image, ax=axes, location="bottom", shrink=0.6, pad=0.02, aspect=40)
        bar.set_ticks(
            [low, high] if low < high else [low], labels=[readable_bytes(low), readable_bytes(high)][: 1 + (low < high)]
        )
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=8)
        bar.set_label(f"a step, over {link}" if link in _SHADES else f"a step, {link}", fontsize=8)
    step = gpus_per_node // found.devices if found.devices < gpus_per_node else 1
    if rows // max(1, step) <= 40 and found.devices <= gpus_per_node:
        for edge in range(0, rows + 1, max(1, step)):
            axes.axhline(edge - 0.5, color="#bbbbbb", linewidth=0.6, zorder=1)
            axes.axvline(edge - 0.5, color="#bbbbbb", linewidth=0.6, zorder=1)
    what = _row_text(found.devices, gpus_per_node)
    axes.set(xlabel=f"receiving {what}", ylabel=f"sending {what}", xlim=(-0.5, rows - 0.5), ylim=(rows - 0.5, -0.5))
    axes.tick_params(labelsize=8, colors=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    head = f"{title}, {axes_text(sizes)}" if title else axes_text(sizes)
    count = math.prod(sizes.values())
    sums = f"a GPU sends {readable_bytes(found.nvlink / count)} over NVLink, {readable_bytes(found.network / count)}"
    axes.set_title(f"{head}\n{sums} over the network a step", fontsize=10, color=INK)
    if not found.bytes.any():
        axes.text(0.5, 0.5, "nothing travels", transform=axes.transAxes, ha="center", color=MUTED)
    return picture


def _row_text(devices: int, gpus_per_node: int) -> str:
    if devices == 1:
        return "device"
    return "node" if devices == gpus_per_node else f"{plural(devices // gpus_per_node, 'node')} each"


def _pairs(
    flow: Flow, sizes: Mapping[str, int], count: int, gpus_per_node: int
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Senders and receivers by number, and the bytes of each pair."""
    _check(flow, sizes)
    axes = [axis for axis in flow.axes if sizes[axis] > 1]
    if not axes or not flow.bytes:
        return []
    names = list(sizes)
    grid = np.arange(count).reshape(tuple(sizes.values()))
    along = sorted(names.index(axis) for axis in axes)
    groups = np.moveaxis(grid, along, range(-len(along), 0)).reshape(-1, math.prod(sizes[axis] for axis in axes))
    if flow.group is not None:
        groups = groups.reshape(-1, flow.group)
    size = groups.shape[1]
    if size == 1:
        return []

    def shifted(by: int) -> tuple[np.ndarray, np.ndarray]:
        return groups.ravel(), np.roll(groups, -by, axis=1).ravel()

    if flow.pattern == "all":
        return [(*shifted(by), flow.bytes / (size - 1)) for by in range(1, size)]
    if flow.pattern == "neighbours":
        return [(*shifted(by), flow.bytes / 2) for by in (1, -1)]
    # as many rings as a group has devices in a node, each leaving nodes at another one
    local = int(np.count_nonzero(groups[0] // gpus_per_node == groups[0, 0] // gpus_per_node))
    in_nodes = groups.reshape(len(groups), -1, local) if size % local == 0 else groups[:, None]
    rings = in_nodes.shape[-1] if in_nodes.shape[1] > 1 else 1
    found = []
    for ring in range(rings):
        order = np.roll(in_nodes, -ring, axis=2).reshape(len(groups), size)
        found.append((order.ravel(), np.roll(order, -1, axis=1).ravel(), flow.bytes / rings))
    return found


def _check(flow: Flow, sizes: Mapping[str, int]) -> None:
    for axis in flow.axes:
        if axis not in sizes:
            raise UserError(f"a flow runs along {axis!r}, and the mesh has {', '.join(sizes)}")
    if flow.pattern not in get_args(Pattern):
        raise UserError(f"a flow's pattern is {flow.pattern!r}: one of {', '.join(get_args(Pattern))}")
    if not math.isfinite(flow.bytes) or flow.bytes < 0:
        raise UserError(f"a flow has {flow.bytes!r} bytes: give a number, 0 or above")
    if flow.group is not None:
        whole = math.prod(sizes[axis] for axis in flow.axes)
        if flow.group < 1 or whole % flow.group:
            raise UserError(f"a flow's group of {flow.group} does not divide the {whole} devices along {flow.axes}")

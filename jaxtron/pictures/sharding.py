"""Where an array lies: its blocks with the devices that hold them, and the mesh in the same colours."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle

from jaxtron.pictures.blocks import ArrayBlocks, Block, array_blocks
from jaxtron.pictures.grid import MOST_NUMBERS, axes_text, device_grid, draw_devices, mesh_sizes
from jaxtron.pictures.picture import INK, MUTED, Picture, bare, colors, ink_on, numbers_text
from jaxtron.words import plural

# of an array of three dimensions and more, planes that are drawn
MOST_PLANES = 6
# inches of the side of one plane, and characters to an inch of the text in it
_PLANE, _CHARACTERS = 3.0, 15.0


def sharding(
    shape: Iterable[Any], spec: Iterable[Any], mesh: Any, *, title: str = "", dims: Sequence[str] = ()
) -> Picture:
    """An array's blocks on a mesh: left the array, in each block the devices that hold it, right the mesh.

    What has one colour is one block, so that devices of one colour are replicas of each other. The last two dimensions
    are drawn as rows and columns, a vector as a row; each part of those before them is a plane of its own, as of
    parameters stacked by layer. Hatched is padding, zeros behind the array that make its parts even.

    `shape` and `spec` are those of a JAX array (`x.shape`, `x.sharding.spec`), or of a row of `session.layout()`;
    `mesh` is a JAX mesh or sizes by axis, outermost first; `dims` names the dimensions. Raises `UserError` as
    `array_blocks` does.
    """
    found, sizes = array_blocks(shape, spec, mesh), mesh_sizes(mesh)
    fills = dict(zip(found.devices, colors(len(found.devices)), strict=True))
    planes = _planes(found)
    shown = planes if len(planes) <= MOST_PLANES else [*planes[: MOST_PLANES - 1], planes[-1]]
    columns = len(shown) if len(shown) < 4 else 2 if len(shown) == 4 else 3
    rows = -(-len(shown) // columns)
    side = _PLANE if columns == 1 else 2.3
    # as wide as high beside the planes of a matrix or more
    grid = device_grid(sizes, aspect=1.4 if _rank(found) < 2 else 1.0)
    mesh_width = 3.4
    picture = Picture(
        1.0 + side * columns + mesh_width, 1.5 + max(side * rows * (0.55 if _rank(found) < 2 else 1), 2.2)
    )
    halves: Any = picture.subfigures(1, 2, width_ratios=(side * columns + 0.6, mesh_width))
    left, right = halves
    boxes = list(left.subplots(rows, columns, squeeze=False).flat)
    for place, (box, plane) in enumerate(zip(boxes, shown, strict=False)):
        label = _plane_text(found, plane, dims)
        if len(shown) < len(planes) and place == MOST_PLANES - 1:
            label += f"  ({len(planes) - MOST_PLANES:,} not drawn)"
        _draw_plane(box, found, plane, fills, label, dims, side)
        if place % columns:
            box.set_ylabel("")
        if place + columns < len(shown):
            box.set_xlabel("")
    for box in boxes[len(shown) :]:
        box.set_visible(False)
    leading = [_dim_text(found, dim, dims) for dim in range(_rank(found) - 2) if found.parts[dim] > 1]
    if leading:
        left.supxlabel(f"planes: {'; '.join(leading)}", fontsize=8, color=INK)
    holder = {device: block for block, devices in found.devices.items() for device in devices}
    devices = _in_mesh_order(mesh, len(holder))
    box = right.subplots()
    draw_devices(box, grid, [fills[holder[device]] for device in devices], [str(device) for device in devices])
    box.set_title("devices by the block they hold", fontsize=9, color=MUTED)
    sizes_text = " x ".join(f"{size:,}" for size in found.shape) or "a scalar"
    copies = f"each on {plural(found.replicas, 'device')}"
    blocks = f"{plural(len(found.devices), 'block')} of {' x '.join(f'{size:,}' for size in found.part) or '1 number'}"
    head = f"{title}: {sizes_text}" if title else sizes_text
    picture.suptitle(f"{head} on {axes_text(sizes)}\n{blocks}, {copies}", fontsize=10, color=INK)
    return picture


def _in_mesh_order(mesh: Any, count: int) -> list[int]:
    try:
        return [int(number) for number in mesh.device_ids.flat]
    except (AttributeError, ValueError):
        return list(range(count))


def _rank(found: ArrayBlocks) -> int:
    return len(found.shape)


def _planes(found: ArrayBlocks) -> list[Block]:
    """Blocks along all but the last two dimensions."""
    leading = found.parts[: max(0, _rank(found) - 2)]
    return [
        tuple(place // math.prod(leading[dim + 1 :]) % leading[dim] for dim in range(len(leading)))
        for place in range(math.prod(leading))
    ]


def _plane_text(found: ArrayBlocks, plane: Block, dims: Sequence[str]) -> str:
    """`layers 0:8`, or `[0:8, 0:2]` without names."""
    if not plane:
        return ""
    ranges = [f"{own.start}:{own.stop}" for own in found.slices((*plane, *(0,) * (_rank(found) - len(plane))))]
    kept = ranges[: len(plane)]
    if dims:
        return ", ".join(f"{name} {text}" for name, text in zip(dims, kept, strict=False))
    return f"[{', '.join(kept)}]"


def _draw_plane(
    axes: Axes,
    found: ArrayBlocks,
    plane: Block,
    fills: dict[Block, str],
    label: str,
    dims: Sequence[str],
    side: float,
) -> None:
    rank = _rank(found)
    down, across = (rank - 2 if rank > 1 else None), (rank - 1 if rank else None)
    rows = 1 if down is None else found.parts[down]
    columns = 1 if across is None else found.parts[across]
    height = 1.0 if rank > 1 else 0.3
    cell_width, cell_height = 1 / columns, height / rows
    most = int(side * _CHARACTERS * cell_width) if side * cell_height > 0.12 else 0
    places = [(row, column) for row in range(rows) for column in range(columns)]
    blocks = [(*plane, *((row, column)[2 - min(rank, 2) :])) for row, column in places]
    corners = np.array([(0, 0), (cell_width, 0), (cell_width, cell_height), (0, cell_height)])
    cells = [corners + (column * cell_width, row * cell_height) for row, column in places]
    edge: dict[str, Any] = {"edgecolors": "white", "linewidths": 1.2} if len(places) <= 64 else {"antialiased": False}
    axes.add_collection(PolyCollection(cells, facecolors=[fills[block] for block in blocks], **edge))
    for block, cell in zip(blocks if len(blocks) <= MOST_NUMBERS else (), cells, strict=False):
        text = numbers_text(found.devices[block], most)
        across_cell, down_cell = cell.mean(0)
        axes.text(across_cell, down_cell, text, ha="center", va="center", fontsize=7.5, color=ink_on(fills[block]))
    _hatch(axes, found, down, across, height)
    bare(axes, xlim=(-0.01, 1.01), ylim=(height + 0.01, -0.01), aspect="equal")
    axes.set_title(label, fontsize=8, color=INK)
    if across is not None:
        axes.set_xlabel(_dim_text(found, across, dims), fontsize=8, color=INK)
    if down is not None:
        axes.set_ylabel(_dim_text(found, down, dims), fontsize=8, color=INK)


def _hatch(axes: Axes, found: ArrayBlocks, down: int | None, across: int | None, height: float) -> None:
    """Marks what lies behind the array's end."""
    own: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "hatch": "////", "linewidth": 0.0}
    if across is not None:
        kept = found.shape[across] / (found.part[across] * found.parts[across])
        if kept < 1:
            axes.add_patch(Rectangle((kept, 0), 1 - kept, height, **own))
    if down is not None:
        kept = found.shape[down] / (found.part[down] * found.parts[down])
        if kept < 1:
            axes.add_patch(Rectangle((0, kept * height), 1, (1 - kept) * height, **own))


def _dim_text(found: ArrayBlocks, dim: int, dims: Sequence[str]) -> str:
    """`embed: 4,096 = 4 x 1,024 (fsdp, data)`."""
    name = dims[dim] if dim < len(dims) else f"dim {dim}"
    size, parts, part = found.shape[dim], found.parts[dim], found.part[dim]
    if parts == 1:
        return f"{name}: {size:,}, whole"
    padding = part * parts - size
    more = f" - {padding:,} padding" if padding else ""
    return f"{name}: {size:,} = {parts:,} x {part:,}{more} ({', '.join(found.axes[dim])})"

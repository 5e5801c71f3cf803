"""A mesh's devices as cells of a plane: outer axes down, inner ones across, with gaps where an axis goes on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from jaxtron.config import UserError
from jaxtron.pictures.picture import INK, MUTED, bare, ink_on

# beyond these a picture is no picture
MOST_DEVICES = 200_000
# more cells than these have no room for their numbers
MOST_NUMBERS = 160
# more than these touch each other, for gaps would be finer than the picture's dots
MOST_APART = 600
_GAP = 0.22


@dataclass(frozen=True)
class DeviceGrid:
    """Where each device is drawn, in the mesh's order: the left and upper corner of a cell of size 1."""

    left: Float64[np.ndarray, "N"]
    top: Float64[np.ndarray, "N"]
    down: str
    """The axes that go down, such as `data 2 x fsdp 2`."""
    across: str

    @property
    def width(self) -> float:
        """Of all cells."""
        return float(self.left.max()) + 1

    @property
    def height(self) -> float:
        """Of all cells."""
        return float(self.top.max()) + 1


def mesh_sizes(mesh: Any) -> dict[str, int]:
    """Sizes by axis, outermost first, of a mapping or a JAX mesh; a `UserError` for others."""
    sizes = mesh if isinstance(mesh, Mapping) else getattr(mesh, "shape", None)
    if not isinstance(sizes, Mapping) or not sizes:
        raise UserError(f"a mesh is a JAX mesh, or sizes by axis such as {{'data': 2, 'tensor': 4}}, not {mesh!r}")
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise UserError(f"mesh axis {axis!r} has size {size!r}: give a whole number above 0")
    count = math.prod(sizes.values())
    if count > MOST_DEVICES:
        raise UserError(f"a mesh of {count:,} devices is too large to draw, at most {MOST_DEVICES:,}")
    return {str(axis): int(size) for axis, size in sizes.items()}


def axes_text(sizes: Mapping[str, int]) -> str:
    """`data 2 x tensor 4`, without axes of size 1."""
    return " x ".join(f"{axis} {size:,}" for axis, size in sizes.items() if size > 1) or "one device"


def device_grid(sizes: Mapping[str, int], *, aspect: float = 1.4) -> DeviceGrid:
    """The cells of a mesh, cut between its axes so that they are about `aspect` times as wide as high."""
    named = [(axis, size) for axis, size in sizes.items() if size > 1] or [("device", 1)]
    count = math.prod(size for _, size in named)

    def strangeness(cut: int) -> float:
        rows = math.prod(size for _, size in named[:cut])
        return abs(math.log(count / rows / rows / aspect))

    cut = min(range(len(named)), key=strangeness)
    if strangeness(cut) > math.log(8) and count > 24:
        # one long axis: rows of as many as fill a plane
        columns = min((size for size in range(1, count + 1) if count % size == 0), key=lambda size: _far(size, count))
        places = np.arange(count)
        title = f"{axes_text(sizes)}, in rows of {columns:,}"
        return DeviceGrid((places % columns).astype(float), (places // columns).astype(float), "", title)
    inner = math.prod(size for _, size in named[cut:])
    places, gap = np.arange(count), _GAP if count <= MOST_APART else 0.0
    return DeviceGrid(
        _spread(places % inner, [size for _, size in named[cut:]], gap),
        _spread(places // inner, [size for _, size in named[:cut]], gap),
        axes_text(dict(named[:cut])) if cut else "",
        axes_text(dict(named[cut:])),
    )


def _far(columns: int, count: int) -> float:
    return abs(math.log(columns * columns / count / 1.4))


def _spread(places: np.ndarray, sizes: Sequence[int], gap: float) -> Float64[np.ndarray, "N"]:
    """Places along nested axes, a gap wherever one but the innermost goes on; larger where an outer one does."""
    found, inner = places.astype(float), 1
    for size in sizes[:0:-1]:
        inner *= size
        found += gap * (places // inner)
    return found


def draw_devices(
    axes: Axes, grid: DeviceGrid, fills: Sequence[str], labels: Sequence[str] | None = None, *, size: float = 8.0
) -> None:
    """The cells in their colours, with labels where they have room; `size` is that of the text in points."""
    edge = 0.92 if len(fills) <= MOST_APART else 1.0
    corners = np.array([(0, 0), (edge, 0), (edge, edge), (0, edge)])
    cells = np.stack([grid.left, grid.top], -1)[:, None] + corners
    axes.add_collection(PolyCollection(list(cells), facecolors=list(fills), edgecolors="none", antialiased=edge < 1))
    if labels is not None and len(labels) <= MOST_NUMBERS:
        for left, top, label, fill in zip(grid.left, grid.top, labels, fills, strict=True):
            axes.text(left + 0.46, top + 0.46, label, ha="center", va="center", fontsize=size, color=ink_on(fill))
    bare(axes, xlim=(-0.1, grid.width + 0.1), ylim=(grid.height + 0.1, -0.1), aspect="equal")
    axes.set_xlabel(grid.across, fontsize=8, color=INK)
    axes.set_ylabel(grid.down, fontsize=8, color=MUTED if not grid.down else INK)

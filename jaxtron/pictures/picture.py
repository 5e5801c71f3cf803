"""What all pictures share: a figure that shows and saves itself, colours, and numbers of devices as text."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.words import either

# Told apart also by who does not tell red from green (Okabe and Ito, 2008); black text reads on all but the last two.
COLORS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d0d0d0", "#0072b2", "#d55e00")
# for what has more kinds: of Tol's muted colours those that are not alike
MORE = ("#882255", "#999933", "#332288", "#117733")
INK, MUTED, PALE = "#222222", "#666666", "#ececec"
FORMATS = ("png", "svg", "pdf")
DPI = 110


class Picture(Figure):
    """A matplotlib Figure that a notebook shows without `%matplotlib`, and that writes itself with `save`."""

    def __init__(self, width: float, height: float) -> None:
        """`width` and `height` are inches."""
        super().__init__(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(self)

    def png(self) -> bytes:
        """The picture as a PNG file's content."""
        return self._content("png")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture, replacing a file whole: PNG, SVG or PDF as the name ends; gives the path.

        Raises `UserError` for another ending, or where it cannot be written.
        """
        target = Path(path)
        kind = target.suffix.lower().removeprefix(".")
        if kind not in FORMATS:
            raise UserError(f"cannot save a picture as {target.name!r}: end the name in .{either(FORMATS)}")
        write_whole(target, self._content(kind))
        return target

    def _content(self, kind: str) -> bytes:
        image = io.BytesIO()
        # a text in an SVG stays text, and no date makes two of one picture differ
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxtron"}):
            self.savefig(image, format=kind, metadata=undated.get(kind))
        return image.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def colors(count: int) -> list[str]:
    """So many colours: the named ones while they last, then shades in order, so that neighbours look alike."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    shades = matplotlib.colormaps["viridis"]
    # its darkest end would hide black lines
    return [to_hex(shades(0.12 + 0.88 * place / (count - 1))) for place in range(count)]


def paler(color: str, share: float) -> str:
    """A colour mixed with so much white."""
    red, green, blue = (1 - (1 - part) * (1 - share) for part in to_rgb(color))
    return to_hex((red, green, blue))


def ink_on(color: str) -> str:
    """Black or white, what reads better on a colour."""
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def numbers_text(numbers: Sequence[int], most: int = 1000) -> str:
    """Device numbers in at most so many characters, runs as `0-3` and even steps as `0, 8, .. 56`; else their count."""
    ordered = sorted(numbers)
    for text in (_runs(ordered), _steps(ordered), f"{len(ordered):,} devices", f"x{len(ordered):,}"):
        if text is not None and len(text) <= most:
            return text
    return ""


def _runs(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _steps(numbers: list[int]) -> str | None:
    steps = {after - before for before, after in zip(numbers, numbers[1:], strict=False)}
    if len(steps) != 1 or len(numbers) < 4:
        return None
    return f"{numbers[0]}, {numbers[1]}, .. {numbers[-1]}"


def bare(axes: Axes, **settings: Any) -> None:
    """Takes frame and ticks from axes that are no diagram, and sets what is given."""
    axes.set(xticks=[], yticks=[], **settings)
    axes.spines[:].set_visible(False)

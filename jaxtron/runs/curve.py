"""Curves as text: a letter where a curve is, on a grid as wide as the terminal."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT = 16
MEETING = "#"
NARROWEST, WIDEST = 40, 120


@dataclass(frozen=True)
class TextCurve:
    """Points (place, value) in order, drawn with a letter."""

    letter: str
    label: str
    points: Sequence[tuple[int, float]]


def draw(curves: Sequence[TextCurve], axis: str, *, width: int | None = None) -> list[str]:
    """Lines of a drawing of all curves over one axis, and their letters below; `#` is where several are.

    A column has the mean of a curve's points in it. Curves without points are told to have none.
    """
    shown = [curve for curve in curves if curve.points]
    if not shown:
        return ["no losses yet"]
    width = width or max(NARROWEST, min(WIDEST, shutil.get_terminal_size((100, 24)).columns))
    places = [place for curve in shown for place, _ in curve.points]
    first, last = min(places), max(places)
    left = 9
    columns = width - left - 2
    means = [_by_column(curve.points, first, last, columns) for curve in shown]
    values = [value for mean in means for value in mean.values()]
    low, high = min(values), max(values)
    if high / 2 - low / 2 <= 1e-9 * abs(high):
        # all the same
        low, high = low - 0.5 * abs(low) - 0.5, high + 0.5 * abs(high) + 0.5
    half = high / 2 - low / 2
    grid = [[" "] * columns for _ in range(HEIGHT)]
    for curve, mean in zip(shown, means, strict=True):
        for column, value in mean.items():
            row = round((high / 2 - value / 2) / half * (HEIGHT - 1))
            grid[row][column] = curve.letter if grid[row][column] == " " else MEETING
    lines = []
    for row, cells in enumerate(grid):
        named = row in (0, HEIGHT // 2, HEIGHT - 1)
        value = high - 2 * row / (HEIGHT - 1) * half
        lines.append(f"{_short(value) if named else '':>{left}} |{''.join(cells)}".rstrip())
    lines.append(f"{'':>{left}} +{'-' * columns}")
    begin, end = f"{axis} {first:,}", f"{last:,}"
    lines.append(f"{'':>{left}}  {begin}{end:>{max(len(end) + 1, columns - len(begin))}}")
    lines += [f"  {curve.letter} {curve.label}{'' if curve.points else ' (no losses yet)'}" for curve in curves]
    if any(MEETING in cells for cells in grid):
        lines.append(f"  {MEETING} several")
    return lines


def _by_column(points: Sequence[tuple[int, float]], first: int, last: int, columns: int) -> dict[int, float]:
    sums: dict[int, tuple[float, int]] = {}
    for place, value in points:
        column = 0 if last == first else (place - first) * (columns - 1) // (last - first)
        total, count = sums.get(column, (0.0, 0))
        sums[column] = (total + value, count + 1)
    means = {column: total / count for column, (total, count) in sums.items()}
    # sums of numbers that are almost too large
    return {column: mean for column, mean in means.items() if math.isfinite(mean)}


def _short(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"

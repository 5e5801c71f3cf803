"""What fills a device's memory, by what it is for, against its size."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from jaxtron.config import UserError
from jaxtron.pictures.picture import COLORS, INK, MORE, MUTED, PALE, Picture
from jaxtron.words import readable_bytes

GIB = 2**30


def memory(classes: Mapping[str, Any], capacity: Any = None, *, title: str = "") -> Picture:
    """A device's bytes by class, each bar beginning where the one above ends, so that the last one's end is the sum.

    `classes` has bytes by what they are for (`plan.memory.classes`), or several such by name, which are then drawn one
    below the other to be compared. `capacity` are the bytes of the device: a line, behind which it does not fit. What
    has no bytes is left out. Raises `UserError` for what are no bytes.
    """
    if not isinstance(classes, Mapping) or not classes:
        raise UserError(f"memory takes bytes by what they are for, such as {{'weights': 2**30}}, not {classes!r}")
    if capacity is not None:
        _check("capacity", capacity, least=1)
    several = [isinstance(value, Mapping) for value in classes.values()]
    if any(several) and not all(several):
        raise UserError("memory takes bytes by class, or several such by name, and here are both: give one of them")
    if not all(several):
        classes = {"": classes}
    for name, own in classes.items():
        for what, size in own.items():
            _check(f"{name} {what}".strip(), size)
    # in the order given, also where only one has bytes of a kind
    names = list(dict.fromkeys(what for own in classes.values() for what in own))
    found = {str(label): {name: float(own[name]) for name in names if own.get(name)} for label, own in classes.items()}
    used = [name for name in names if any(name in own for own in found.values())]
    return _compared(found, used, capacity, title) if all(several) else _falling(found[""], capacity, title)


def _check(name: str, size: object, least: float = 0) -> None:
    if isinstance(size, bool) or not isinstance(size, int | float) or not math.isfinite(size) or size < least:
        raise UserError(f"memory: {name} is {size!r}; give a number of bytes, {least:g} or above")


def _falling(own: dict[str, float], capacity: float | None, title: str) -> Picture:
    total = sum(own.values())
    picture = Picture(8.5, 1.4 + 0.3 * (len(own) + 1))
    axes = picture.subplots()
    end = max(total, capacity or 0.0, 1.0)
    begun = 0.0
    for row, size in enumerate(own.values()):
        axes.barh(row, size / GIB, left=begun / GIB, color=_color(row), height=0.75)
        _beside(axes, row, begun, begun + size, end, f"{readable_bytes(size)}, {_share(size / total)}")
        begun += size
    axes.barh(len(own), total / GIB, color="#4d4d4d", height=0.75)
    _beside(axes, len(own), 0.0, total, end, readable_bytes(total), "white")
    axes.set_yticks(range(len(own) + 1), [*own, "in all"])
    _finish(axes, len(own) + 1, end, capacity, title, [total])
    return picture


def _compared(found: dict[str, dict[str, float]], names: list[str], capacity: float | None, title: str) -> Picture:
    totals = [sum(own.values()) for own in found.values()]
    end = max(*totals, capacity or 0.0, 1.0)
    picture = Picture(9.5, 1.6 + 0.45 * len(found))
    axes = picture.subplots()
    for row, own in enumerate(found.values()):
        begun = 0.0
        for what in names:
            size = own.get(what, 0.0)
            if size:
                color = _color(names.index(what))
                axes.barh(row, size / GIB, left=begun / GIB, color=color, height=0.72, edgecolor="white", linewidth=0.6)
            begun += size
        _beside(axes, row, 0.0, begun, end, readable_bytes(begun))
    axes.set_yticks(range(len(found)), list(found))
    handles = [Patch(color=_color(place), label=name) for place, name in enumerate(names)]
    picture.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    _finish(axes, len(found), end, capacity, title, totals)
    return picture


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "under 1%"


def _color(place: int) -> str:
    every = (*COLORS, *MORE)
    return every[place % len(every)]


def _beside(axes: Axes, row: int, begun: float, ended: float, end: float, text: str, ink: str = INK) -> None:
    """A bar's size behind it, or before it where there is no room."""
    if ended < 0.8 * end:
        axes.text((ended + 0.006 * end) / GIB, row, text, va="center", fontsize=8, color=INK)
    elif begun > 0.2 * end:
        axes.text((begun - 0.006 * end) / GIB, row, text, va="center", ha="right", fontsize=8, color=INK)
    else:
        axes.text((ended - 0.006 * end) / GIB, row, text, va="center", ha="right", fontsize=8, color=ink)


def _finish(axes: Axes, rows: int, end: float, capacity: float | None, title: str, totals: list[float]) -> None:
    axes.set(xlabel="GiB of one device", ylim=(rows - 0.4, -0.6), xlim=(0, end * 1.04 / GIB))
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(axis="x", color=PALE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    head = title
    if capacity is not None:
        axes.axvline(capacity / GIB, color="#d55e00", linewidth=1.6)
        axes.axvspan(capacity / GIB, max(end * 1.04, capacity) / GIB, color="#d55e00", alpha=0.12, linewidth=0)
        over = [total for total in totals if total > capacity]
        fits = "it fits" if len(totals) == 1 else "all fit"
        if over:
            fits = f"{readable_bytes(max(over) - capacity)} too much"
            fits = fits if len(totals) == 1 else f"{len(over)} of {len(totals)} do not fit"
        head = f"{title}{': ' if title else ''}{readable_bytes(max(totals))} of {readable_bytes(capacity)}, {fits}"
    axes.set_title(head, fontsize=10, color=INK)
    axes.xaxis.label.set_color(MUTED)

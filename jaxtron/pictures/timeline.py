"""A pipeline's schedule on a clock: a row a stage, a bar as long as its slot takes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from jaxtron.config import UserError
from jaxtron.pictures.picture import INK, MUTED, PALE, Picture, paler
from jaxtron.pipeline.schedules.figures import Slot, Span, figures
from jaxtron.pipeline.schedules.figures import timeline as spans_of
from jaxtron.pipeline.schedules.schedule import Schedule, check
from jaxtron.words import plural, readable_seconds

SLOT_COLORS: dict[Slot, str] = {"forward": "#56b4e9", "backward": "#e69f00", "weight": "#009e73"}
# more bars than these have no room for their numbers
MOST_LABELS = 1500
_AFTER = "#999999"


def timeline(
    schedule: Schedule,
    seconds: Mapping[Slot, Sequence[float]] | None = None,
    *,
    after: Mapping[str, float] | None = None,
    window: tuple[float, float] | None = None,
    latency: float = 0.0,
    title: str = "",
) -> Picture:
    """When each stage runs what: forwards, backwards and weight gradients, with the numbers of their microbatches.

    `seconds` are those of each slot by virtual stage (`plan.prediction.slot_seconds`); without them a forward through
    a whole stage takes 1. `after` is what all stages do when the last slot has ended, such as the optimizer, in the
    same unit. `latency` is how long a message travels. `window` is the part of the step to look at, from and to.
    Raises `UserError` for a table that is no schedule, seconds of other virtual stages, and a window in which nothing
    is.
    """
    check(schedule)
    _check_seconds(schedule, seconds)
    spans = spans_of(schedule, durations=seconds, latency=latency)
    ended = max(stage_spans[-1].end for stage_spans in spans if stage_spans)
    busiest = max(sum(span.end - span.start for span in stage_spans) for stage_spans in spans)
    after = {} if after is None else {str(name): float(length) for name, length in after.items() if length}
    end = ended + sum(after.values())
    begin, stop = _window(window, end)
    shown = [[span for span in own if span.end > begin and span.start < stop] for own in spans]
    longest = max((span.end - span.start for own in spans for span in own), default=1.0)
    # as wide as bars with numbers in them need, as far as a page goes
    width = min(36.0, max(8.0, 0.3 * figures(schedule).makespan * schedule.num_chunks * (stop - begin) / end))
    labelled = sum(map(len, shown)) <= MOST_LABELS and longest * (width - 1.2) / (stop - begin) > 0.1
    width = width if labelled else min(width, 16.0)
    picture = Picture(width, 1.5 + min(0.4, 9 / schedule.num_stages) * schedule.num_stages)
    axes = picture.subplots()
    axes.set_facecolor(PALE)
    _draw(axes, shown, schedule.num_chunks, labelled)
    for stage, own in enumerate(shown if labelled else ()):
        for span in own:
            middle = (max(span.start, begin) + min(span.end, stop)) / 2
            axes.text(middle, stage, str(span.work.microbatch), ha="center", va="center", fontsize=6, color=INK)
    at = ended
    for place, (_, length) in enumerate(after.items()):
        axes.axvspan(at, at + length, color=_AFTER, alpha=1 - 0.4 * place / len(after), linewidth=0)
        at += length
    bubble = f"bubble {ended / busiest - 1:.1%}" if busiest else "nothing takes time"
    total = f"{readable_seconds(end)}, " if seconds else ""
    name = title or schedule.name
    axes.set_title(
        f"{name}: {total}{plural(schedule.num_microbatches, 'microbatch')}, {bubble}", fontsize=10, color=INK
    )
    axes.set_xlabel("seconds" if seconds else "time, in forwards of one microbatch through a stage", color=MUTED)
    every = max(1, math.ceil(schedule.num_stages / 32))
    axes.set(ylabel="stage", xlim=(begin, stop), ylim=(schedule.num_stages - 0.5, -0.5))
    axes.set_yticks(range(0, schedule.num_stages, every))
    axes.tick_params(labelsize=8)
    axes.spines[:].set_visible(False)
    names: list[Slot] = ["forward", "backward", "weight"] if schedule.split else ["forward", "backward"]
    meaning = {"forward": "forward", "backward": "backward", "weight": "weight gradient"}
    if schedule.split:
        meaning["backward"] = "input gradient"
    handles = [Patch(color=SLOT_COLORS[name], label=meaning[name]) for name in names]
    handles += [
        Patch(color=_AFTER, alpha=1 - 0.4 * place / len(after), label=f"{name} ({readable_seconds(length)})")
        for place, (name, length) in enumerate(after.items())
    ]
    handles.append(Patch(facecolor=PALE, label="idle"))
    if schedule.num_chunks > 1:
        handles.append(Patch(color="none", label="later chunks are paler"))
    picture.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=8)
    return picture


def _draw(axes: Axes, spans: Sequence[Sequence[Span]], num_chunks: int, labelled: bool) -> None:
    bars = [(stage, span) for stage, own in enumerate(spans) for span in own]
    left, right = (np.array([getattr(span, end) for _, span in bars]) for end in ("start", "end"))
    top = np.array([stage for stage, _ in bars]) - 0.45
    bottom = top + 0.9
    corners = np.stack([np.stack([left, right, right, left], -1), np.stack([top, top, bottom, bottom], -1)], -1)
    shades = {
        (slot, chunk): paler(color, 0.6 * chunk / num_chunks)
        for slot, color in SLOT_COLORS.items()
        for chunk in range(num_chunks)
    }
    fills = [shades[span.slot, span.work.chunk] for _, span in bars]
    edge: dict[str, Any] = (
        {"edgecolors": "white", "linewidths": 0.4} if labelled else {"edgecolors": "none", "antialiased": False}
    )
    axes.add_collection(PolyCollection(list(corners), facecolors=fills, **edge))


def _window(window: tuple[float, float] | None, end: float) -> tuple[float, float]:
    if window is None:
        return 0.0, end
    begin, stop = window
    if not (math.isfinite(begin) and math.isfinite(stop)) or not 0 <= begin < min(stop, end):
        raise UserError(f"window {window} shows nothing: the step goes from 0 to {end:.4g}; give a part of that")
    return float(begin), float(min(stop, end))


def _check_seconds(schedule: Schedule, seconds: Mapping[Slot, Sequence[float]] | None) -> None:
    if seconds is None:
        return
    wanted: list[Slot] = ["forward", "backward", "weight"] if schedule.split else ["forward", "backward"]
    for slot in wanted:
        own = list(seconds.get(slot, ()))
        if len(own) != schedule.num_virtual or any(not math.isfinite(value) or value < 0 for value in own):
            raise UserError(
                f"seconds[{slot!r}] needs a number, 0 or above, for each of the "
                f"{plural(schedule.num_virtual, 'virtual stage')} of the schedule {schedule.name}, and has {own[:8]}"
            )

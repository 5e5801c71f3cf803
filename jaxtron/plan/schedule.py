"""A schedule drawn: its table as text with its figures, and its timeline as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.color import ColorSystem
from rich.style import Style

from jaxtron.command import write_whole
from jaxtron.pictures.timeline import timeline
from jaxtron.pipeline.schedules.figures import Figures, Slot, figures, flight, slots
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work
from jaxtron.words import plural, readable_bytes

_STYLES: dict[Slot, Style] = {
    "forward": Style(color="blue"),
    "backward": Style(color="green"),
    "weight": Style(color="yellow"),
}
_PLAIN = Style()


def schedule_text(
    schedule: Schedule,
    *,
    width: int = 120,
    color: bool = False,
    chunk_bytes: Sequence[int] | None = None,
    latency: float = 0.0,
) -> str:
    """The table, a line a stage and a column a tick, then the figures of each stage and of the whole.

    Of a table wider than `width` the middle is left out, and a line says so. `chunk_bytes` are the activations that
    one microbatch leaves in each of a stage's chunks; they stay until its weight gradients where these are put off.
    """
    found = figures(schedule, latency=latency)
    sizes = f"{plural(schedule.num_stages, 'stage')}, {plural(schedule.num_microbatches, 'microbatch')}"
    chunks = f", {schedule.num_chunks} chunks a stage ({schedule.placement})" if schedule.num_chunks > 1 else ""
    return "\n".join(
        [
            f"{schedule.name}: {sizes}{chunks}",
            "",
            *_table(schedule, width, color),
            "",
            *_stages(schedule, found, chunk_bytes),
            "",
            *_totals(schedule, found, latency),
        ]
    )


def draw_schedule(schedule: Schedule, path: Path, *, seconds: Mapping[Slot, Sequence[float]] | None = None) -> None:
    """Draws the timeline into `path`, a PNG, replacing it whole; `seconds` are as `pictures.timeline` takes them."""
    title = f"{schedule.name}, predicted" if seconds else ""
    write_whole(path, timeline(schedule, seconds, title=title).png())


def _table(schedule: Schedule, width: int, color: bool) -> list[str]:
    """Lines: the ticks' numbers, then each stage's cells."""
    cells = [[_cell(entry, schedule.num_chunks) for entry in row] for row in schedule.table]
    cell_width = max(len(str(schedule.num_ticks - 1)), *(len(cell) for row in cells for cell in row))
    label_width = len(f"stage {schedule.num_stages - 1}")
    shown = max(2, (width - label_width - 4) // (cell_width + 1))
    first, last = schedule.num_ticks, schedule.num_ticks
    if shown < schedule.num_ticks:
        first = (shown + 1) // 2
        last = schedule.num_ticks - shown // 2
    ticks = [*range(first), *range(last, schedule.num_ticks)]
    cut = first < last

    def line(label: str, parts: list[str], mark: str) -> str:
        if cut:
            parts = [*parts[:first], mark, *parts[first:]]
        return f"{label:<{label_width}}  {' '.join(parts)}".rstrip()

    lines = [line("tick", [f"{tick:<{cell_width}}" for tick in ticks], "   ")]
    for stage in range(schedule.num_stages):
        parts = []
        for tick in ticks:
            drawn = cells[tick][stage] or "."
            padding = " " * (cell_width - len(drawn))
            parts.append((_colored(schedule.table[tick][stage], schedule.num_chunks) if color else drawn) + padding)
        lines.append(line(f"stage {stage}", parts, "..."))
    if cut:
        lines.append(f"ticks {first} to {last - 1} are left out to fit {width} columns")
    meaning = "F forward, B backward" + (" to the input, W to the weights" if schedule.split else "")
    numbers = "the number is the microbatch" if schedule.num_chunks == 1 else "the numbers are chunk.microbatch"
    lines.append(f"{meaning}; {numbers}; . is idle")
    return lines


def _cell(entry: Entry, num_chunks: int) -> str:
    return "".join(_slot(slot, work, num_chunks) for slot, work in slots(entry))


def _colored(entry: Entry, num_chunks: int) -> str:
    parts = [(_slot(slot, work, num_chunks), _STYLES[slot]) for slot, work in slots(entry)] or [(".", _PLAIN)]
    return "".join(style.render(part, color_system=ColorSystem.STANDARD) for part, style in parts)


def _slot(slot: Slot, work: Work, num_chunks: int) -> str:
    number = f"{work.microbatch}" if num_chunks == 1 else f"{work.chunk}.{work.microbatch}"
    return slot[0].upper() + number


def _stages(schedule: Schedule, found: Figures, chunk_bytes: Sequence[int] | None) -> list[str]:
    """A table of the stages' figures."""
    assert chunk_bytes is None or len(chunk_bytes) == schedule.num_chunks
    header = ["stage", "warm-up", "most in flight"]
    if schedule.split:
        header += ["most deferred", "most together"]
    if chunk_bytes is not None:
        header.append("peak activations")
    rows = [header]
    for stage, figure in enumerate(found.stages):
        row = [str(stage), str(figure.warm_up), str(figure.in_flight)]
        if schedule.split:
            row += [str(figure.deferred), str(figure.held)]
        if chunk_bytes is not None:
            row.append(readable_bytes(max(tick.held for tick in flight(schedule, stage, chunk_bytes))))
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _totals(schedule: Schedule, found: Figures, latency: float) -> list[str]:
    delay = f", messages {latency:g} late" if latency else ""
    lines = [
        f"ticks     {found.num_ticks}, ideally {found.ideal_ticks}: {found.tick_bubble:.1%} more",
        f"time      {found.makespan:.4g} forwards of a stage{delay}; bubble {found.bubble:.1%}, "
        f"or {found.lockstep_bubble:.1%} if every tick waits for its longest entry",
        f"messages  {found.num_messages} a step",
    ]
    if found.messages:
        boundary, count = max(found.messages.items(), key=lambda item: item[1])
        kind = "activations" if boundary.slot == "forward" else "gradients"
        lines[-1] += (
            f", at most {count} of one kind over one link ({kind}, stage {boundary.source} to {boundary.target})"
        )
    return lines

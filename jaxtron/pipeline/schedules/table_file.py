"""Schedules on file: CSV with a line a tick, a column a stage, and cells such as `F0.3 B1.2` (kind, chunk.microbatch).

An empty cell is idle. The first line may be `# placement: v_shape` (how chunks lie), the next `stage 0,stage 1,...`.
"""

import csv
import io
import re
from pathlib import Path
from typing import cast, get_args

from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.pipeline.schedules.schedule import IDLE, ChunkPlacement, Entry, Schedule, Work, check

_KINDS = {"F": "forward", "B": "backward", "W": "weight"}
_WORK = re.compile(r"([FBW])(\d+)\.(\d+)")
_HEADER = re.compile(r"(stage|device|rank)\s*\d+", re.IGNORECASE)
_PLACEMENT = re.compile(r"#\s*placement:\s*(\S*)\s*")


def write_csv(schedule: Schedule, path: Path) -> None:
    """Write the table, replacing the file; `UserError` if it cannot be written."""
    lines = io.StringIO()
    lines.write(f"# placement: {schedule.placement}\n")
    rows = csv.writer(lines, lineterminator="\n")
    rows.writerow([f"stage {stage}" for stage in range(schedule.num_stages)])
    rows.writerows([cell(entry) for entry in row] for row in schedule.table)
    write_whole(path, lines.getvalue())


def read_csv(path: Path) -> Schedule:
    """The checked table in a file. Raises `UserError`, naming tick and stage, for cells or an order that are wrong."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the schedule {path}: {error.strerror}; python -m jaxtron.plan --schedule "
            "--csv FILE writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the schedule {path}: it is no text ({error.reason})") from error
    placement: ChunkPlacement = "round_robin"
    while lines and lines[0].startswith("#"):
        if found := _PLACEMENT.fullmatch(lines[0]):
            if found[1] not in get_args(ChunkPlacement):
                raise UserError(f"{path}: unknown placement {found[1]!r}; use {' or '.join(get_args(ChunkPlacement))}")
            placement = cast(ChunkPlacement, found[1])
        lines = lines[1:]
    # a line of nothing is a tick at which all are idle, except at the end
    while lines and not lines[-1]:
        lines = lines[:-1]
    rows = list(csv.reader(lines))
    if rows and rows[0] and all(_HEADER.fullmatch(text.strip()) for text in rows[0]):
        rows = rows[1:]
    if not rows:
        raise UserError(f"{path}: the table is empty; give a line a tick and a column a stage")
    width = max(len(row) for row in rows)
    table = []
    for tick, row in enumerate(rows):
        if row and len(row) != width:
            raise UserError(f"{path}, tick {tick}: {len(row)} columns where others have {width}; give one a stage")
        entries = (_entry(text, f"{path}, tick {tick}, stage {stage}") for stage, text in enumerate(row))
        table.append(tuple(entries) if row else (IDLE,) * width)
    works = [work for row in table for entry in row for work in (entry.forward, entry.backward, entry.weight) if work]
    num_microbatches = 1 + max((work.microbatch for work in works), default=0)
    num_chunks = 1 + max((work.chunk for work in works), default=0)
    schedule = Schedule(path.stem, tuple(table), num_microbatches, num_chunks, placement)
    try:
        check(schedule)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return schedule


def cell(entry: Entry) -> str:
    """`F0.3 B1.2`, or the empty string."""
    slots = zip(_KINDS, (entry.forward, entry.backward, entry.weight), strict=True)
    return " ".join(f"{letter}{work.chunk}.{work.microbatch}" for letter, work in slots if work is not None)


def _entry(text: str, place: str) -> Entry:
    slots: dict[str, Work] = {}
    order = ""
    for word in text.split():
        match = _WORK.fullmatch(word)
        if not match:
            raise UserError(f"{place}: {word!r} is no work; write F, B or W and chunk.microbatch, such as F0.3")
        if match[1] in order:
            raise UserError(f"{place}: two {match[1]} in {text!r}; a tick has one of each at most")
        order += match[1]
        slots[_KINDS[match[1]]] = Work(int(match[2]), int(match[3]))
    if order != "".join(letter for letter in _KINDS if letter in order):
        raise UserError(f"{place}: {text!r} is out of order; within a tick F runs first, then B, then W")
    return Entry(**slots)

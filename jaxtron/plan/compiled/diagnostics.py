"""What a compiled step does that nobody asked for, and what was asked for and is not in it."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtron.plan.compiled.census import UNKNOWN_AXES, Collective
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.layout import ParameterRow
from jaxtron.words import readable_bytes

# a payload a step below this is scalars, norms and what a loss needs of its rows
SMALL = 2**20
# master weight and two moments in float32: what a copy of a parameter costs at rest
STATE_COPIES = 3
# the part of a GPU's memory from which copies are worth a line
NOTABLE = 1e-3
# what each axis is for: weights and gradients over the batch axes, the residual stream over tensor, messages over pipe
EXPECTED = {
    "data": {"all_gather", "reduce_scatter", "all_reduce"},
    "fsdp": {"all_gather", "reduce_scatter", "all_reduce"},
    "context": {"all_gather", "reduce_scatter", "all_reduce", "collective_permute", "all_to_all"},
    "tensor": {"all_gather", "reduce_scatter", "all_reduce"},
    "pipe": {"collective_permute", "all_reduce"},
}
_REMATERIALIZED = re.compile(r"Involuntary full rematerialization.*?(?:HLO operation: )(?P<operation>%?[\w.\-]+)", re.I)
_NAMED = re.compile(r'op_name="([^"]*)"')
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_NO_ROOM = re.compile(r"Can't reduce memory use below [^(]*\((\d+) bytes\).*only reduced to [^(]*\((\d+) bytes\)")


@dataclass(frozen=True)
class Diagnostic:
    """One line for the reader: what, the bytes a GPU and step that it concerns, and `file:line` where known."""

    what: str
    bytes: int = 0
    location: str = ""


def diagnostics(rehearsal: Rehearsal) -> list[Diagnostic]:
    """All that the compiled program shows, the largest first."""
    found = [
        *_compiler(rehearsal.messages),
        *_resharding(rehearsal),
        *_replicated(rehearsal),
        *_missing(rehearsal),
    ]
    return sorted(found, key=lambda diagnostic: -diagnostic.bytes)


def _compiler(messages: tuple[str, ...]) -> Iterator[Diagnostic]:
    """What XLA itself complains about."""
    for line in dict.fromkeys(messages):
        if match := _REMATERIALIZED.search(line):
            name, source = _NAMED.search(line), _SOURCE.search(line)
            what = f"XLA makes a whole copy of {name[1] if name else match['operation']} to change its layout"
            yield Diagnostic(what, location=f"{source[1]}:{source[2]}" if source else "")
        elif match := _NO_ROOM.search(line):
            limit, needed = int(match[1]), int(match[2])
            yield Diagnostic(
                f"XLA estimates {readable_bytes(needed)} for the program and aims at {readable_bytes(limit)}: it then "
                "schedules for little memory, which can leave communication exposed"
            )


def _resharding(rehearsal: Rehearsal) -> Iterator[Diagnostic]:
    """Communication of a kind that its axes are not for: a layout was changed where none of ours asks for it."""
    for entry in rehearsal.collectives:
        if entry.group_size <= 1 or entry.step_bytes < SMALL or _is_expected(entry):
            continue
        axes = " and ".join(entry.axes) if entry.axes != UNKNOWN_AXES else "no axes of the mesh"
        moved = readable_bytes(entry.step_bytes)
        what = f"{entry.kind} over {axes}: {moved} a step, from {entry.source or 'no named operation'}"
        yield Diagnostic(what, entry.step_bytes, entry.location)


def _is_expected(entry: Collective) -> bool:
    return all(entry.kind in EXPECTED.get(axis, ()) for axis in entry.names)


def _replicated(rehearsal: Rehearsal) -> Iterator[Diagnostic]:
    """Parameters that every device of an axis keeps whole, although the axis divides one of their dimensions."""
    sizes = rehearsal.session.sizes
    for axis, number in sizes.items():
        whole = [row for row in rehearsal.layout if number > 1 and _could_split(row, axis, sizes)]
        saved = sum(row.bytes * STATE_COPIES * (number - 1) // number for row in whole)
        if saved >= NOTABLE * rehearsal.gpu.memory_bytes:
            whole.sort(key=lambda row: -row.bytes)
            names = ", ".join(row.name for row in whole[:3]) + (", ..." if len(whole) > 3 else "")
            is_unshared = axis in ("data", "context") and rehearsal.session.config.sharding.zero == "none"
            fix = "; --sharding.zero optimizer shares them" if is_unshared else ""
            yield Diagnostic(
                f"whole on all {number} of {axis}: the state of {names}, {readable_bytes(saved)} a GPU{fix}", saved
            )


def _could_split(row: ParameterRow, axis: str, sizes: Mapping[str, int]) -> bool:
    """Whether a trained parameter lies whole along an axis that divides what a device has of one of its dimensions.

    What is not trained lies as it is used: sharing it is what `sharding.zero parameters` is for.
    """
    if row.status != "trained" or any(axis in flags for flags in row.split):
        return False
    parts = [math.prod(sizes[name] for name in flags) for flags in row.split]
    dims = zip(row.shape, row.axes, parts, strict=True)
    return any(name != "layers" and dim % (part * sizes[axis]) == 0 for dim, name, part in dims)


def _missing(rehearsal: Rehearsal) -> Iterator[Diagnostic]:
    """Axes of the mesh over which nothing is communicated."""
    for axis, parts in rehearsal.session.sizes.items():
        if parts > 1 and not any(axis in entry.names for entry in rehearsal.collectives):
            yield Diagnostic(f"mesh.{axis} is {parts}, but the compiled step communicates nothing over it")

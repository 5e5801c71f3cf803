"""What a compiled step does that nobody asked for, and what was asked for and is not in it."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from jaxtron.plan.compiled.bound import WholeCopy
from jaxtron.plan.compiled.census import UNKNOWN_AXES, Collective
from jaxtron.plan.compiled.communication import exchange_of
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.layout import ParameterRow
from jaxtron.sharding.folding import FLAGS, Axes
from jaxtron.sharding.mesh import Folding
from jaxtron.words import plural, readable_bytes, readable_seconds

# a payload a step below this is scalars, norms and what a loss needs of its rows
SMALL = 2**20
# master weight and two moments in float32: what a copy of a parameter costs at rest
STATE_COPIES = 3
# the part of a GPU's memory from which copies are worth a line
NOTABLE = 1e-3
# what each flag is for: weights and gradients over the batch axes, the residual stream over tensor, messages over pipe
# and what is in no stack
EXPECTED = {
    "data": {"all_gather", "reduce_scatter", "all_reduce"},
    "fsdp": {"all_gather", "reduce_scatter", "all_reduce"},
    "context": {"all_gather", "reduce_scatter", "all_reduce", "collective_permute", "all_to_all"},
    "tensor": {"all_gather", "reduce_scatter", "all_reduce"},
    "pipe": {"collective_permute", "all_gather", "reduce_scatter", "all_reduce"},
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


def diagnostics(
    rehearsal: Rehearsal, exchanged: Collection[float] = (), copies: Iterable[WholeCopy] = ()
) -> list[Diagnostic]:
    """All that the compiled program shows, the largest first; `exchanged` are the bytes of the arrays that devices with
    experts send each other in a layer, `copies` what the bound of the step found copied."""
    found = [
        *_compiler(rehearsal.messages),
        *_resharding(rehearsal, frozenset(exchanged)),
        *_replicated(rehearsal),
        *_missing(rehearsal, is_exchanged=bool(exchanged)),
        *map(_copied, copies),
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


def _resharding(rehearsal: Rehearsal, exchanged: frozenset[float]) -> Iterator[Diagnostic]:
    """Communication of a kind that its axes are not for: a layout was changed where none of ours asks for it."""
    folding = rehearsal.session.rules.folding
    is_exchange = exchange_of(folding)
    for entry in rehearsal.collectives:
        if entry.group_size <= 1 or entry.step_bytes < SMALL or _is_expected(entry, folding):
            continue
        if is_exchange(entry) and entry.bytes in exchanged:
            continue
        axes = " and ".join(entry.axes) if entry.axes != UNKNOWN_AXES else "no axes of the mesh"
        moved = readable_bytes(entry.step_bytes)
        what = f"{entry.kind} over {axes}: {moved} a step, from {entry.source or 'no named operation'}"
        yield Diagnostic(what, entry.step_bytes, entry.location)


def _is_expected(entry: Collective, folding: Folding) -> bool:
    owners = {axis: flag for flag in FLAGS for axis in folding.axes(flag)}
    return all(entry.kind in EXPECTED.get(owners.get(axis, ""), ()) for axis in folding.named(entry.names))


def _copied(copy: WholeCopy) -> Diagnostic:
    """A whole array that is moved and nothing computed."""
    moved, least = copy.runs * copy.moved, readable_seconds(copy.seconds)
    what = f"XLA {copy.what}, {readable_bytes(moved)} read and written by {plural(copy.runs, 'run')} a step"
    return Diagnostic(f"{what}: {least} at least", moved, copy.location)


def _replicated(rehearsal: Rehearsal) -> Iterator[Diagnostic]:
    """Parameters that every device of an axis keeps whole, although the axis divides one of their dimensions."""
    folding = rehearsal.session.rules.folding
    for flag in FLAGS:
        copies: dict[Axes, list[ParameterRow]] = {}
        for row in rehearsal.layout:
            # experts may split a part of a flag's axes
            axes = _unused(row, flag, folding)
            if folding.size(axes) > 1 and _could_split(row, axes, folding):
                copies.setdefault(axes, []).append(row)
        for axes, whole in copies.items():
            number = folding.size(axes)
            saved = sum(row.bytes * STATE_COPIES * (number - 1) // number for row in whole)
            if saved < NOTABLE * rehearsal.gpu.memory_bytes:
                continue
            whole.sort(key=lambda row: -row.bytes)
            names = ", ".join(row.name for row in whole[:3]) + (", ..." if len(whole) > 3 else "")
            is_unshared = flag in ("data", "context") and rehearsal.session.config.sharding.zero == "none"
            fix = "; --sharding.zero optimizer shares them" if is_unshared else ""
            along = " x ".join(folding.names(axes))
            yield Diagnostic(
                f"whole on all {number} of {along}: the state of {names}, {readable_bytes(saved)} a GPU{fix}", saved
            )


def _unused(row: ParameterRow, flag: str, folding: Folding) -> Axes:
    """The axes of a flag that split no dimension of a parameter."""
    used = {axis for names in row.split for axis in folding.named(names)}
    return tuple(axis for axis in folding.axes(flag) if axis not in used)


def _could_split(row: ParameterRow, axes: Axes, folding: Folding) -> bool:
    """Whether it is trained and these axes divide what a device has of one of its dimensions.

    What is not trained lies as it is used: sharing it is what `sharding.zero parameters` is for.
    """
    parts = [folding.size(folding.named(names)) for names in row.split]
    dims = zip(row.shape, row.axes, parts, strict=True)
    fits = (name != "layers" and dim % (part * folding.size(axes)) == 0 for dim, name, part in dims)
    return row.status == "trained" and any(fits)


def _missing(rehearsal: Rehearsal, *, is_exchanged: bool) -> Iterator[Diagnostic]:
    """Flags of the mesh over which nothing is communicated."""
    folding = rehearsal.session.rules.folding
    used = {axis for entry in rehearsal.collectives for axis in folding.named(entry.names)}
    for flag, parts in rehearsal.session.sizes.items():
        if parts > 1 and not used & {*folding.axes(flag)}:
            yield Diagnostic(f"mesh.{flag} is {parts}, but the compiled step communicates nothing over it")
    parts = rehearsal.session.rules.parts("expert")
    if is_exchanged and parts > 1 and not any(map(exchange_of(folding), rehearsal.collectives)):
        yield Diagnostic(f"mesh.expert is {parts}, but the compiled step exchanges nothing over it")

"""A plan's communication as flows along the mesh, from which a page draws who sends how much to whom."""

from typing import Any

from jaxtron.plan.compiled.census import part_of
from jaxtron.plan.compiled.communication import CommunicationRow
from jaxtron.plan.html.parts import PageParts
from jaxtron.plan.plan import Plan
from jaxtron.sharding.folding import Axes

# the others are permutations
_RINGS = ("all_gather", "reduce_scatter", "all_reduce", "collective_broadcast")
_EXCHANGES = ("all_to_all", "ragged_all_to_all")


def flow_data(plan: Plan, parts: PageParts) -> dict[str, Any]:
    """`flows`: bytes that a device sends in a step to others along some dimensions of the mesh, and in which pattern.

    `ring`: to the next of its group in the mesh's order. `all`: an equal part to each of its group. `both`: half to the
    next along the dimension and half to the one before, `line` without going round from the last to the first (stages
    of a pipeline). `group` are neighbours along the one dimension that make up a group, where it is not all of them.
    `row` is the flow's line in the plan's communication. `unknown` are bytes of a device whose groups match no axes.
    """
    flows, unknown = [], 0.0
    for number, (row, axes) in enumerate(zip(plan.communication, parts.axes, strict=True)):
        if not row.sent:
            continue
        if not axes or not {*axes} <= {*parts.sizes}:
            unknown += row.sent
            continue
        flows.append(
            {
                "row": number,
                "dims": [list(parts.sizes).index(axis) for axis in axes],
                "group": part_of(row.key.axes[0])[1],
                "pattern": _pattern(row, axes, parts),
                "bytes": row.sent,
            }
        )
    return {"sizes": list(parts.sizes.values()), "axes": list(parts.sizes), "flows": flows, "unknown": unknown}


def _pattern(row: CommunicationRow, axes: Axes, parts: PageParts) -> str:
    if row.key.kind in _RINGS:
        return "ring"
    if row.key.kind in _EXCHANGES:
        return "all"
    if axes != ("pipe",):
        return "ring"
    schedule = parts.schedule
    return "both" if schedule.num_chunks > 1 and schedule.placement == "round_robin" else "line"

"""A plan's communication as flows between devices, for a picture of who sends how much to whom."""

from jaxtron.pictures.traffic import Flow, Pattern
from jaxtron.plan.compiled.census import part_of
from jaxtron.plan.plan import Plan
from jaxtron.sharding.folding import refine


def axis_sizes(plan: Plan) -> dict[str, int]:
    """Sizes of the plan's mesh by axis, outermost first, with the cuts of the experts' view too."""
    return refine(plan.mesh, *_experts(plan), tuple(plan.mesh)).sizes  # type: ignore[arg-type]


def flows(plan: Plan) -> list[Flow]:
    """Who sends what in a step, by kinds of communication; what the compiler's groups did not tell is left out.

    Gathers, scatters and reductions go round a ring, all-to-alls to all alike; messages of a pipeline to both
    neighbours, other permutations to the next.
    """
    refined = refine(plan.mesh, *_experts(plan), tuple(plan.mesh))  # type: ignore[arg-type]
    found = []
    for row in plan.communication:
        parts = [part_of(axis) for axis in row.key.axes]
        axes = tuple(own for name, _ in parts for own in refined.flags.get(name, (name,)))
        if not row.sent or not axes or not {*axes} <= {*refined.sizes}:
            continue
        pattern: Pattern = "ring"
        if "all_to_all" in row.key.kind:
            pattern = "all"
        elif row.key.kind not in ("all_gather", "reduce_scatter", "all_reduce") and row.key.axes == ("pipe",):
            pattern = "neighbours"
        found.append(Flow(axes, row.sent, pattern, parts[0][1]))
    return found


def _experts(plan: Plan) -> tuple[int, int]:
    return plan.experts.get("expert", 1), plan.experts.get("expert_tensor", 1)

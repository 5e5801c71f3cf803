"""What a page shows of a compiled step beside its plan: parameters, schedule, and which mesh axes communicate."""

from dataclasses import dataclass

from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.layout import ParameterRow
from jaxtron.plan.plan import Plan
from jaxtron.sharding.folding import Axes


@dataclass(frozen=True)
class PageParts:
    """Kept of a rehearsal, which itself is too large to keep of every layout that a search compiles.

    `sizes` are those of the mesh by axis, outermost first, as devices fill nodes; `axes` the mesh axes along which each
    row of the plan's communication runs.
    """

    parameters: tuple[ParameterRow, ...]
    schedule: Schedule
    sizes: dict[str, int]
    axes: tuple[Axes, ...]


def page_parts(rehearsal: Rehearsal, plan: Plan) -> PageParts:
    """The parts of a rehearsal and the plan that was made of it."""
    session = rehearsal.session
    folding = session.rules.folding
    names = [tuple(axis.partition("/")[0] for axis in row.key.axes) for row in plan.communication]
    return PageParts(
        parameters=rehearsal.layout,
        schedule=session.config.schedule(session.sizes["pipe"]),
        sizes=dict(folding.mesh.shape),
        axes=tuple(map(folding.named, names)),
    )

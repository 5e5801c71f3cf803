"""Which foldings of experts a search looks at on each mesh: all are timed once, and few are searched further."""

import math
from collections.abc import Sequence

from jaxtron.config import UserError
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.machine import Machine
from jaxtron.plan.search.candidates import CandidateLayout
from jaxtron.run.configuration import Configuration

# sizes by flag, outermost first
Mesh = tuple[tuple[str, int], ...]
# parts of experts, and of their width
Folding = tuple[int, int]


def narrowed(
    found: Sequence[CandidateLayout], own: CandidateLayout | None, config: Configuration, machine: Machine, node: int
) -> list[CandidateLayout]:
    """The layouts whose folding is the fastest of its mesh, or the fastest of those that split experts most, which take
    least memory; and the own.

    Timed is one layout of each mesh and folding, for schedule, rows and recomputation hardly change which is faster.
    """
    firsts: dict[Mesh, dict[Folding, CandidateLayout]] = {}
    for layout in found:
        firsts.setdefault(_mesh(layout), {}).setdefault(_folding(layout), layout)
    chosen = {mesh: _chosen(foldings, config, machine, node) for mesh, foldings in firsts.items()}
    return [layout for layout in found if layout == own or _folding(layout) in chosen[_mesh(layout)]]


def _chosen(
    foldings: dict[Folding, CandidateLayout], config: Configuration, machine: Machine, node: int
) -> set[Folding]:
    if len(foldings) == 1:
        return {*foldings}
    seconds: dict[Folding, float] = {}
    for folding, layout in foldings.items():
        try:
            seconds[folding] = predict(layout.config(config), layout.sizes, machine, gpus_per_node=node).step_seconds
        except UserError:
            continue
    if not seconds:
        # what is wrong is told where they are weighed
        return {*foldings}
    most = max(map(math.prod, seconds))
    split = {folding: time for folding, time in seconds.items() if math.prod(folding) == most}
    return {min(seconds, key=lambda one: seconds[one]), min(split, key=lambda one: split[one])}


def _mesh(layout: CandidateLayout) -> Mesh:
    return tuple(layout.sizes.items())


def _folding(layout: CandidateLayout) -> Folding:
    return layout.expert, layout.expert_tensor

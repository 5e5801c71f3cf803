"""`python -m jaxtron.plan CONFIG.yaml --search`: layouts for so many GPUs, those that fit ranked by predicted time."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.plan.candidates import Layout, layouts, own_layout
from jaxtron.plan.estimate import Estimator
from jaxtron.plan.machine import Machine
from jaxtron.plan.memory import MemoryUse
from jaxtron.plan.prediction import Breakdown, Prediction, predict
from jaxtron.plan.report import Plan
from jaxtron.plan.table import aligned, duration, size
from jaxtron.train.config import Configuration

FORMAT = 1
# Memory by formula may be so far off: what is this little above the GPU's is left to the compiler.
MARGIN = 0.05
# A search compiles at most so many layouts for each that it was asked for: some turn out not to fit.
MOST_COMPILED = 3
# Rows of the table; the file that --json writes has all.
SHOWN = 10
NAMES = {"products": "products", "memory": "passes over memory", "optimizer": "optimizer", "bubble": "bubble"}


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory and its step by formula, and its plan where it was compiled."""

    layout: Layout
    estimate: MemoryUse
    formula: Prediction
    plan: Plan | None = None

    @property
    def prediction(self) -> Prediction:
        """The step, with the compiled overlap where there is a plan."""
        return self.formula if self.plan is None else self.plan.prediction

    @property
    def memory(self) -> MemoryUse:
        """Bytes of a GPU, the compiler's where there is a plan."""
        return self.estimate if self.plan is None else self.plan.memory


@dataclass(frozen=True)
class Search:
    """Candidates in the order of their rank: first those that were compiled, then by formula, the fastest first.

    `unfit` were compiled and found too big. `own` is the configuration's own layout, whether it fits or not, and
    `own_problem` why there is none.
    """

    config: Configuration
    gpu: str
    num_gpus: int
    gpus_per_node: int
    candidates: tuple[Candidate, ...]
    num_layouts: int
    num_refused: int
    num_too_big: int
    own: Candidate | None
    own_problem: str | None
    unfit: tuple[Candidate, ...] = ()

    @property
    def best(self) -> Candidate:
        """The first."""
        return self.candidates[0]

    def rank(self, layout: Layout) -> int | None:
        """Of a layout, 1 for the first; None where it is not among the candidates."""
        ranks = (number for number, one in enumerate(self.candidates, 1) if one.layout == layout)
        return next(ranks, None)


def search(config: Configuration, machine: Machine, *, num_gpus: int, gpus_per_node: int) -> Search:
    """The search by formula: nothing is compiled; tensor parallelism is traced on devices of this machine.

    Candidates are all layouts whose estimated bytes are at most `MARGIN` above the GPU's. Raises `UserError` where no
    layout runs, or none fits, or the GPUs do not fill nodes.
    """
    if num_gpus % min(gpus_per_node, num_gpus):
        raise UserError(f"{num_gpus} GPUs do not fill nodes of {gpus_per_node}: use a multiple of {gpus_per_node}")
    config, capacity = config.resolved(), machine.datasheet.memory_bytes
    own, own_problem = _own(config, num_gpus)
    found = list(dict.fromkeys((*layouts(config, num_gpus, gpus_per_node), *((own,) if own else ()))))
    # layouts of one schedule follow each other, so that its table is made once
    batch = config.train.global_batch
    found.sort(key=lambda layout: (layout.pipe, layout.microbatches(batch), repr(layout.pipeline)))
    weigh = _Weigher(config, machine, gpus_per_node)
    candidates: list[Candidate] = []
    refused: list[str] = []
    own_candidate, least = None, (float("inf"), "")
    for layout in found:
        try:
            needed, candidate = weigh(layout, limit=None if layout == own else (1 + MARGIN) * capacity)
        except UserError as error:
            refused.append(str(error))
            continue
        least = min(least, (needed, layout.text(batch)))
        if layout == own:
            own_candidate = candidate
        if candidate is not None and needed <= (1 + MARGIN) * capacity:
            candidates.append(candidate)
    if not candidates:
        raise UserError(_nothing(config, machine, num_gpus, refused, *least))
    candidates.sort(key=lambda one: (one.formula.step_seconds, one.estimate.total))
    too_big = len(found) - len(refused) - len(candidates)
    counts = (len(found), len(refused), too_big)
    where = (config, machine.gpu, num_gpus, gpus_per_node)
    return Search(*where, tuple(candidates), *counts, own_candidate, own_problem)


class _Weigher:
    """Bytes and seconds of layouts by formula."""

    def __init__(self, config: Configuration, machine: Machine, gpus_per_node: int) -> None:
        self.config, self.machine, self.gpus_per_node = config, machine, gpus_per_node
        self.estimator = Estimator(config)

    def __call__(self, layout: Layout, limit: float | None) -> tuple[int, Candidate | None]:
        """Bytes a GPU needs, or already more than `limit`; and the candidate unless they are more."""
        config, gpu = layout.config(self.config), self.machine.datasheet
        # of most layouts the state alone is too much, which is quickly told
        state = self.estimator.state(config, layout.sizes).total
        if limit is not None and state > limit:
            return state, None
        memory = self.estimator.memory(config, layout.sizes, gpu)
        if limit is not None and memory.total > limit:
            return memory.total, None
        prediction = predict(config, layout.sizes, self.machine, gpus_per_node=self.gpus_per_node)
        return memory.total, Candidate(layout, memory, prediction)


def compile_best(found: Search, top: int, compile_layout: Callable[[Configuration], Plan]) -> Search:
    """The search with the best `top` candidates compiled and ranked anew by their plans; one of each mesh.

    What does not fit when compiled is dropped, and the next taken: of the same mesh, one that fits if its estimate is
    as wrong. Raises `UserError` where none of the compiled ones fits.
    """
    compiled: list[Candidate] = []
    unfit: list[Candidate] = []
    for candidate in found.candidates:
        if len(compiled) == top or len(compiled) + len(unfit) == MOST_COMPILED * top:
            break
        mesh = candidate.layout.sizes
        if any(one.layout.sizes == mesh for one in compiled):
            continue
        if any(one.layout.sizes == mesh and not _corrected(candidate, one) for one in unfit):
            continue
        candidate = replace(candidate, plan=compile_layout(candidate.layout.config(found.config)))
        (compiled if candidate.memory.fits else unfit).append(candidate)
    if not compiled:
        raise UserError(
            f"none of the {len(unfit)} best layouts fits when compiled: they need "
            f"{size(min(one.memory.total for one in unfit))} and more a GPU; use a larger --top, or more GPUs"
        )
    compiled.sort(key=lambda one: one.prediction.step_seconds)
    seen = {one.layout for one in (*compiled, *unfit)}
    rest = [one for one in found.candidates if one.layout not in seen]
    return replace(found, candidates=(*compiled, *rest), unfit=tuple(unfit))


def _corrected(candidate: Candidate, wrong: Candidate) -> bool:
    """Whether a candidate fits if its estimate is as far off as that of another."""
    more = wrong.memory.total - wrong.estimate.total
    return candidate.estimate.total + more <= candidate.estimate.capacity


def _own(config: Configuration, num_gpus: int) -> tuple[Layout | None, str | None]:
    try:
        return own_layout(config, num_gpus), None
    except UserError as error:
        return None, str(error)


def _nothing(
    config: Configuration, machine: Machine, num_gpus: int, refused: list[str], needed: float, layout: str
) -> str:
    """Why there is no candidate, in a line."""
    gpu, model = machine.datasheet, config.model
    if layout:
        return (
            f"no layout of {num_gpus} {gpu.name} fits: the smallest, {layout}, needs {size(needed)} or more of "
            f"{size(gpu.memory_bytes)} a GPU; use more GPUs or larger ones"
        )
    if refused:
        return f"no layout of {num_gpus} GPUs runs: {refused[0]}"
    return (
        f"no layout of {num_gpus} GPUs runs: data x fsdp must divide train.global_batch {config.train.global_batch}, "
        f"tensor the {model.num_heads} heads, and pipe is at most the {model.layout.repeats} layers; change --gpus or "
        "--train.global_batch"
    )


def text(found: Search, title: str, tokens: float | None = None) -> str:
    """The ranking for a reader, and why the first is the first; `tokens` is a budget whose days are told."""
    best = found.best
    lines = [
        f"{title}: layouts of {found.num_gpus} {found.gpu} in nodes of {found.gpus_per_node}, "
        f"{found.config.train.global_batch} sequences a step",
        _counted(found),
        "",
        *_table(found),
        "",
        f"type: {best.layout.flags(found.config) or 'nothing, it is the configuration as it is'}",
    ]
    if tokens is not None:
        lines.append(f"  {tokens:.3g} tokens take {best.prediction.days_for(tokens):,.1f} days")
    return "\n".join([*lines, *_reasons(found)])


def _counted(found: Search) -> str:
    others = found.num_layouts - found.num_refused
    parts = [f"{found.num_layouts:,} layouts: {found.num_too_big:,} of {others:,} do not fit by formula"]
    if found.num_refused:
        parts.append(f"{found.num_refused:,} have sizes that do not divide")
    compiled = sum(one.plan is not None for one in found.candidates)
    if compiled or found.unfit:
        parts.append(f"{compiled + len(found.unfit)} compiled, {len(found.unfit)} of them did not fit")
    return "; ".join(parts)


def _table(found: Search) -> list[str]:
    """The best layout of each mesh, and the configuration's own."""
    rows: list[tuple[str, ...]] = [
        ("  rank", "mesh", "schedule", "rows", "recompute", "zero", "step", "MFU", "memory", "")
    ]
    meshes: list[dict[str, int]] = []
    for rank, one in enumerate(found.candidates, 1):
        if len(meshes) < SHOWN and one.layout.sizes not in meshes:
            meshes.append(one.layout.sizes)
            rows.append(_row(str(rank), one, "own" if _is_own(found, one) else ""))
    own = found.own
    if own is not None and not any(row[-1].endswith("own") for row in rows):
        rank = found.rank(own.layout)
        ranked = own if rank is None else found.candidates[rank - 1]
        dropped = next((one for one in found.unfit if one.layout == own.layout), ranked)
        rows.append(_row("-" if rank is None else str(rank), dropped, "own" if rank else "own, does not fit"))
    lines = [*aligned(rows, right=(0, 3, 6, 7, 8)), "  of each mesh the best; rows of a microbatch on a GPU"]
    if any(one.plan is None and not one.memory.fits for one in found.candidates):
        lines.append("  formula?: above the GPU's memory by less than the estimate can be wrong")
    faster = _faster(found)
    if faster:
        lines.append(f"  faster by formula than the best compiled: {faster} more meshes; a larger --top compiles them")
    if found.own_problem is not None:
        lines.append(f"  the configuration's own layout does not run here: {found.own_problem}")
    return lines


def _faster(found: Search) -> int:
    """Meshes that were not compiled and are faster by formula than the best that was: there is more to gain."""
    best = found.best
    if best.plan is None:
        return 0
    tried = [one.layout.sizes for one in (*found.candidates, *found.unfit) if one.plan is not None]
    meshes = {
        one.layout.mesh_text
        for one in found.candidates
        if one.formula.step_seconds < best.prediction.step_seconds and one.layout.sizes not in tried
    }
    return len(meshes)


def _is_own(found: Search, candidate: Candidate) -> bool:
    return found.own is not None and candidate.layout == found.own.layout


def _row(rank: str, one: Candidate, mark: str) -> tuple[str, ...]:
    layout, source = one.layout, "formula" if one.memory.fits else "formula?"
    return (
        rank,
        layout.mesh_text,
        layout.order_text,
        str(layout.rows),
        layout.recompute_text,
        layout.zero_text,
        duration(one.prediction.step_seconds),
        f"{one.prediction.mfu:.1%}",
        size(one.memory.total),
        ", ".join(part for part in ("compiled" if one.plan else source, mark) if part),
    )


def _reasons(found: Search) -> list[str]:
    """The first against the others that were compiled, or the next of other meshes, and the own layout."""
    best = found.best
    others = [one for one in found.candidates[1:] if (one.plan is None) == (best.plan is None)]
    meshes: list[Candidate] = []
    for one in others:
        if all(one.layout.sizes != other.layout.sizes for other in (best, *meshes)):
            meshes.append(one)
    chosen = meshes[:2]
    own = found.own
    if own is not None and own.layout not in [one.layout for one in (best, *chosen)]:
        chosen.append(own)
    lines = ["why it is first (seconds of a step by formula where only one was compiled):"] if chosen else []
    return [*lines, *(f"  {_reason(found, best, one)}" for one in chosen)]


def _reason(found: Search, best: Candidate, other: Candidate) -> str:
    both = best.plan is not None and other.plan is not None
    mine = best.prediction if both else best.formula
    its = other.prediction if both else other.formula
    changes = _changes(mine.breakdown, its.breakdown)
    rank = found.rank(other.layout)
    name = "own" if found.own is not None and other.layout == found.own.layout else "compiled" if both else "formula"
    label = f"rank {rank}" if rank is not None else "does not fit"
    told = ", ".join(f"{seconds:+.3g} s {part}" for part, seconds in changes)
    total = mine.step_seconds - its.step_seconds
    return f"{', '.join(best.layout.differences(other.layout))} ({label}, {name}): {total:+.3g} s, of it {told}"


def _changes(mine: Breakdown, its: Breakdown) -> list[tuple[str, float]]:
    """The largest differences, three at most, none below a twentieth of the largest."""
    parts = {name: seconds - getattr(its, name) for name, seconds in dataclasses.asdict(mine).items()}
    found = sorted(parts.items(), key=lambda part: -abs(part[1]))[:3]
    least = abs(found[0][1]) / 20
    return [(NAMES.get(name, f"{name} communication"), seconds) for name, seconds in found if abs(seconds) >= least]


def write_json(found: Search, title: str, path: Path) -> None:
    """All candidates as plain data, by rank; seconds of a step, bytes of a GPU. The file is replaced whole."""
    own = found.own
    content = {
        "format": FORMAT,
        "title": title,
        "gpu": found.gpu,
        "num_gpus": found.num_gpus,
        "gpus_per_node": found.gpus_per_node,
        "jax_version": jax.__version__,
        "layouts": found.num_layouts,
        "refused": found.num_refused,
        "too_big": found.num_too_big,
        "own": None if own is None else _plain(found, own, found.rank(own.layout)),
        "own_problem": found.own_problem,
        "candidates": [_plain(found, one, rank) for rank, one in enumerate(found.candidates, 1)],
        "unfit": [_plain(found, one, None) for one in found.unfit],
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _plain(found: Search, one: Candidate, rank: int | None) -> dict[str, Any]:
    layout = one.layout
    pipeline = {"schedule": layout.pipeline.schedule, "chunks": layout.pipeline.chunks} if layout.pipe > 1 else None
    return {
        "rank": rank,
        "compiled": one.plan is not None,
        "mesh": layout.sizes,
        "pipeline": pipeline,
        "rows": layout.rows,
        "microbatches": layout.microbatches(found.config.train.global_batch),
        "recompute": layout.recompute,
        "zero": layout.zero,
        "flags": layout.flags(found.config),
        "step_seconds": one.prediction.step_seconds,
        "mfu": one.prediction.mfu,
        "tokens_per_second": one.prediction.tokens_per_second,
        "breakdown": dataclasses.asdict(one.prediction.breakdown),
        "fits": one.memory.fits,
        "memory": {**one.memory.classes, "total": one.memory.total, "capacity": one.memory.capacity},
        "formula": {"step_seconds": one.formula.step_seconds, "memory": one.estimate.total},
    }

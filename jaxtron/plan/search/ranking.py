"""What a search found, as text for a reader and as JSON for a program."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxtron.command import write_whole
from jaxtron.plan.formula.prediction import Breakdown
from jaxtron.plan.search.search import MARGIN, Candidate, SearchResult
from jaxtron.plan.table import aligned
from jaxtron.words import plural, readable_bytes, readable_count, readable_seconds, readable_time

FORMAT = 2
# Rows by formula; the file that --json writes has all.
SHOWN = 10
# Predictions of one program on two layouts do not tell apart what differs by less.
LEAST_GAIN = 0.01
NAMES = {"products": "products", "memory": "passes over memory", "optimizer": "optimizer", "bubble": "bubble"}
HEADER = ("  rank", "mesh", "schedule", "rows", "recompute", "zero", "step", "MFU", "memory", "by formula", "")


def ranking_text(found: SearchResult, title: str, tokens: float | None = None) -> str:
    """Both rankings for a reader, and why the first is the first; `tokens` is a budget whose days are told."""
    best = found.best
    lines = [
        f"{title}: layouts of {found.num_gpus:,} {found.gpu} in nodes of {found.gpus_per_node}, "
        f"{plural(found.config.train.global_batch, 'sequence')} a step",
        _counted(found),
        "",
        *_table(found),
        "",
        f"type: {best.layout.flags(found.config) or 'nothing, it is the configuration as it is'}",
    ]
    if tokens is not None:
        lines.append(f"  {readable_count(tokens)} tokens take {readable_time(best.prediction.seconds_for(tokens))}")
    return "\n".join([*lines, *_gain(found), *_reasons(found)])


def _counted(found: SearchResult) -> str:
    others = found.num_layouts - found.num_refused
    parts = [f"{plural(found.num_layouts, 'layout')}: {found.num_too_big:,} of {others:,} do not fit by formula"]
    if found.num_refused:
        parts.append(f"{found.num_refused:,} have sizes that are no multiples of each other")
    compiled, unfit = len(found.compiled), len(found.unfit)
    if compiled or unfit:
        parts.append(f"{compiled + unfit} compiled, {unfit or 'none'} of them too big")
    return "; ".join(parts)


def _table(found: SearchResult) -> list[str]:
    """Those compiled, then by formula the best layout of each other mesh."""
    compiled = [_row(found, one, str(rank)) for rank, one in enumerate(found.compiled, 1)]
    compiled += [_row(found, one, "-", "does not fit") for one in found.unfit]
    others = list(_one_of_each_mesh(found.candidates, [one.layout.mesh_text for one in found.compiled]))[:SHOWN]
    own = found.own
    if own is not None and own.plan is None and not any(map(found.is_own, others)):
        others.append(own)
    ranks = [str(found.rank(one.layout) or "-") if not found.compiled else "" for one in others]
    formulas = [_row(found, one, rank, _formula_mark(one)) for one, rank in zip(others, ranks, strict=True)]
    header, *lines = aligned([HEADER, *compiled, *formulas], right=(0, 3, 6, 7, 8, 9))
    shown = [header]
    if compiled:
        shown += ["compiled:", *lines[: len(compiled)]]
    if formulas:
        beside = "; compare these seconds with those of the last column alone" if compiled else ""
        shown += [f"by formula, of each mesh the best{beside}:", *lines[len(compiled) :]]
    return [*shown, *_notes(found, others)]


def _row(found: SearchResult, one: Candidate, rank: str, *marks: str) -> tuple[str, ...]:
    layout, is_compiled = one.layout, one.plan is not None
    own = "own" if found.is_own(one) else ""
    return (
        rank,
        layout.mesh_text,
        layout.order_text,
        str(layout.rows),
        layout.recompute_text,
        layout.zero_text,
        readable_seconds(one.prediction.step_seconds),
        f"{one.prediction.mfu:.1%}",
        readable_bytes(one.memory.total),
        readable_seconds(one.formula.step_seconds) if is_compiled else "",
        ", ".join(part for part in (own, *marks) if part),
    )


def _formula_mark(one: Candidate) -> str:
    if one.memory.fits:
        return ""
    return "memory?" if one.memory.total <= (1 + MARGIN) * one.memory.capacity else "does not fit"


def _one_of_each_mesh(candidates: Iterable[Candidate], seen: list[str]) -> Iterable[Candidate]:
    meshes = list(seen)
    for one in candidates:
        if one.layout.mesh_text not in meshes:
            meshes.append(one.layout.mesh_text)
            yield one


def _notes(found: SearchResult, others: list[Candidate]) -> list[str]:
    lines = ["  rows of a microbatch on a GPU"]
    if any(_formula_mark(one) == "memory?" for one in others):
        lines.append("  memory?: above the GPU's memory by less than the estimate can be wrong")
    if found.compiled:
        ratios = [one.prediction.step_seconds / one.formula.step_seconds for one in found.compiled]
        count = _promising(found, min(ratios))
        lines.append(f"  compiled steps take {_range(ratios)} times as long as their formulas say")
        if count:
            lines.append(
                f"  {plural(count, 'more mesh')} would be faster than the first at the smaller of "
                "these; a larger --top compiles them"
            )
    if found.own_problem is not None:
        lines.append(f"  the configuration's own layout does not run here: {found.own_problem}")
    return lines


def _range(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def _promising(found: SearchResult, ratio: float) -> int:
    """Meshes that were not compiled and are faster than the first if they take so many times their formula's time."""
    tried = [one.layout.mesh_text for one in (*found.compiled, *found.unfit)]
    others = _one_of_each_mesh(found.candidates, tried)
    return sum(ratio * one.formula.step_seconds < found.best.prediction.step_seconds for one in others)


def _gain(found: SearchResult) -> list[str]:
    """What the first gains over the configuration's own layout, where both figures are of one kind."""
    own, best = found.own, found.best
    if own is None or (own.plan is None) != (best.plan is None):
        return []
    kind = "compiled" if best.plan is not None else "by formula"
    if found.is_own(best):
        return [f"the configuration's own layout is the fastest of those {kind}"]
    if found.rank(own.layout) is None:
        return [f"the configuration's own layout does not fit: {readable_bytes(own.memory.total)} a GPU, {kind}"]
    mine, its = best.prediction.step_seconds, own.prediction.step_seconds
    gain = f"{1 - mine / its:.1%} less time than the configuration's own layout ({mine:.3g} s, {its:.3g} s, {kind})"
    return [gain + (": too little to tell them apart" if 1 - mine / its < LEAST_GAIN else "")]


def _reasons(found: SearchResult) -> list[str]:
    """The first against the next two of other meshes and the own layout, all compiled or all by formula."""
    best = found.best
    chosen = list(_one_of_each_mesh(found.ranked[1:], [best.layout.mesh_text]))[:2]
    own = next((one for one in found.ranked[1:] if found.is_own(one)), None)
    if own is not None and own not in chosen:
        chosen.append(own)
    lines = ["why it is first:"] if chosen else []
    return [*lines, *(f"  {_reason(found, best, one)}" for one in chosen)]


def _reason(found: SearchResult, best: Candidate, other: Candidate) -> str:
    mine, its = best.prediction, other.prediction
    label = f"rank {found.rank(other.layout)}" + (", own" if found.is_own(other) else "")
    told = ", ".join(f"{seconds:+.3g} s {part}" for part, seconds in _changes(mine.breakdown, its.breakdown))
    total = mine.step_seconds - its.step_seconds
    return f"{', '.join(best.layout.differences(other.layout))} ({label}): {total:+.3g} s, of it {told or 'nothing'}"


def _changes(mine: Breakdown, its: Breakdown) -> list[tuple[str, float]]:
    """The largest differences, three at most, none below a twentieth of the largest."""
    parts = {name: seconds - getattr(its, name) for name, seconds in dataclasses.asdict(mine).items()}
    found = sorted(parts.items(), key=lambda part: -abs(part[1]))[:3]
    least = abs(found[0][1]) / 20
    named = [(NAMES.get(name, f"{name} communication"), seconds) for name, seconds in found]
    return [(name, seconds) for name, seconds in named if seconds and abs(seconds) >= least]


def write_ranking(found: SearchResult, title: str, path: Path) -> None:
    """All layouts as plain data, each list by rank; seconds of a step, bytes of a GPU. The file is replaced whole."""
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
        "own": None if found.own is None else _plain(found, found.own),
        "own_problem": found.own_problem,
        "compiled": [_plain(found, one) for one in found.compiled],
        "unfit": [_plain(found, one) for one in found.unfit],
        "by_formula": [_plain(found, one) for one in found.candidates],
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _plain(found: SearchResult, one: Candidate) -> dict[str, Any]:
    layout = one.layout
    pipeline = {"schedule": layout.pipeline.schedule, "chunks": layout.pipeline.chunks} if layout.pipe > 1 else None
    return {
        "compiled": one.plan is not None,
        "own": found.is_own(one),
        "mesh": layout.sizes | layout.experts,
        "order": layout.order,
        "context_method": layout.attention.method if layout.context > 1 else None,
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

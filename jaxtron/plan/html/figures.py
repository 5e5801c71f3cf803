"""All figures of a plan and of a search as plain data, for the script of a page."""

import dataclasses
import math
from typing import Any

from jaxtron.plan.formula.prediction import Breakdown
from jaxtron.plan.html.parts import PageParts
from jaxtron.plan.html.timeline import timeline_data
from jaxtron.plan.html.traffic import flow_data
from jaxtron.plan.layout import ParameterRow
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.plan.plan import Plan
from jaxtron.plan.search.search import Candidate, SearchResult
from jaxtron.words import readable_count, readable_time

# what a part of the predicted step is called
PARTS = {
    "products": "products",
    "memory": "passes over memory",
    "tensor": "tensor parallelism",
    "fsdp": "fsdp gathers",
    "context": "context parallelism",
    "expert": "expert exchange",
    "pipe": "pipeline messages",
    "bubble": "bubble",
    "data": "gradients, weights",
    "optimizer": "optimizer",
}
# more points are no longer told apart in a picture; all of them are in the file that --json writes
MOST_CANDIDATES = 5000


def plan_data(plan: Plan, parts: PageParts, tokens: float | None = None) -> dict[str, Any]:
    """A plan: its step, memory, mesh, timeline, communication, parameters and diagnostics; seconds and bytes."""
    found = plan.prediction
    days = (
        None if tokens is None else f"{readable_count(tokens)} tokens take {readable_time(found.seconds_for(tokens))}"
    )
    return {
        "title": plan.title,
        "gpu": plan.gpu,
        "num_gpus": plan.num_gpus,
        "gpus_per_node": plan.gpus_per_node,
        "parameters_total": plan.parameters,
        "trained": plan.trained,
        "schedule": plan.schedule,
        "jax_version": plan.jax_version,
        "choices": [*plan.attention, *plan.choices],
        "mesh": {"flags": dict(plan.mesh), "experts": dict(plan.experts)},
        "step": {
            "seconds": found.step_seconds,
            "tokens_per_second": found.tokens_per_second,
            "mfu": found.mfu,
            "hfu": found.hfu,
            "model_flops": found.model_flops,
            "hardware_flops": found.hardware_flops,
            "days": days,
            "parts": _parts(found.breakdown),
        },
        "bound": _bound(plan),
        "memory": _memory(plan.memory, plan.hint),
        "timeline": timeline_data(parts.schedule, found) | {"overlap": parts.schedule.overlap},
        "communication": [_row(plan, number) for number in range(len(plan.communication))],
        "traffic": flow_data(plan, parts),
        "parameters": [_parameter(row) for row in parts.parameters],
        "diagnostics": [[one.what, one.bytes, one.location] for one in plan.diagnostics],
    }


def search_data(found: SearchResult) -> dict[str, Any]:
    """What a search found: every layout that fits by formula and all that were compiled, the fastest first.

    `seconds` and `bytes` are the compiler's of those compiled, `formula` and `estimate` what the formulas say; the two
    are not compared with each other. `kind` is `compiled`, `unfit` (compiled, and too big) or `formula`.
    """
    groups = {"compiled": found.compiled, "unfit": found.unfit, "formula": found.candidates}
    own = found.own
    rows = [(kind, one) for kind, group in groups.items() for one in group]
    if own is not None and all(one.layout != own.layout for _, one in rows):
        rows.insert(0, ("formula", own))
    shown = rows[:MOST_CANDIDATES]
    return {
        "num_layouts": found.num_layouts,
        "num_refused": found.num_refused,
        "num_too_big": found.num_too_big,
        "left_out": len(rows) - len(shown),
        "own_problem": found.own_problem,
        "capacity": found.best.memory.capacity,
        "part_names": list(PARTS.values()),
        "candidates": [_candidate(found, kind, one) for kind, one in shown],
    }


def finite(data: Any) -> Any:
    """The data with null for numbers that are none, which JSON does not have."""
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _parts(breakdown: Breakdown) -> list[list[Any]]:
    seconds = dataclasses.asdict(breakdown)
    return [[PARTS.get(name, name), seconds[name]] for name in sorted(seconds, key=lambda name: -seconds[name])]


def _memory(memory: MemoryUse, hint: str | None) -> dict[str, Any]:
    return {
        "capacity": memory.capacity,
        "total": memory.total,
        "fits": memory.fits,
        "classes": [[name, size] for name, size in memory.classes.items()],
        "stages": [[stage.layers, stage.held, stage.bytes] for stage in memory.stages],
        "hint": hint,
    }


def _bound(plan: Plan) -> dict[str, Any]:
    """Rows: what, seconds, bytes read and written (or sent), FLOPs, launches."""
    bound = plan.bound
    rows: list[list[Any]] = [
        [name, one.seconds, one.read + one.written, one.flops, one.launches] for name, one in bound.classes.items()
    ]
    rows += [
        [f"exposed: {axes.replace(',', ', ')}", one.exposed, one.sent, 0, one.launches]
        for axes, one in bound.communication.items()
    ]
    if bound.bubble:
        rows.append(["bubble", bound.bubble, 0, 0, 0])
    return {"seconds": bound.step_seconds, "mfu": bound.mfu, "rows": sorted(rows, key=lambda row: -row[1])}


def _row(plan: Plan, number: int) -> dict[str, Any]:
    row = plan.communication[number]
    return {
        "kind": row.key.kind,
        "axes": ", ".join(row.key.axes),
        "loops": " x ".join("?" if trips is None else str(trips) for trips in row.key.loops),
        "conditional": row.key.conditional,
        "link": row.link,
        "operations": row.operations,
        "executions": row.executions,
        "payload": row.payload,
        "sent": row.sent,
        "asynchronous": row.asynchronous,
        "seconds": row.seconds,
        "hidden": row.hidden,
    }


def _parameter(row: ParameterRow) -> list[Any]:
    """Name, shape, logical axes, what splits each dimension, role, bytes a device, replicas, elements of padding."""
    split = ["+".join(flags) for flags in row.split]
    role = {"trained": row.role, "frozen": f"frozen {row.role}", "buffer": "buffer"}[row.status]
    return [row.name, list(row.shape), list(row.axes), split, role, row.bytes, row.replicas, row.padding]


def _candidate(found: SearchResult, kind: str, one: Candidate) -> dict[str, Any]:
    layout = one.layout
    seconds = dataclasses.asdict(one.prediction.breakdown)
    return {
        "kind": kind,
        "own": found.is_own(one),
        "mesh": layout.mesh_text,
        "order": " ".join(layout.order),
        "context": layout.attention.method if layout.context > 1 else "",
        "schedule": layout.order_text,
        "rows": layout.rows,
        "microbatches": layout.microbatches(found.config.train.global_batch),
        "recompute": layout.recompute_text,
        "zero": layout.zero_text,
        "flags": layout.flags(found.config),
        "seconds": _short(one.prediction.step_seconds),
        "mfu": _short(one.prediction.mfu),
        "bytes": one.memory.total,
        "fits": one.memory.fits,
        "formula": _short(one.formula.step_seconds),
        "estimate": one.estimate.total,
        "parts": [_short(seconds.get(name, 0.0)) for name in PARTS],
    }


def _short(number: float) -> float:
    """Five digits, which is more than a prediction knows."""
    return float(f"{number:.5g}")

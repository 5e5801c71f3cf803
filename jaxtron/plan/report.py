"""A plan as text for a reader and as JSON for a program."""

import dataclasses
import json
import math
from pathlib import Path

from jaxtron.command import write_whole
from jaxtron.gpus import pool_fraction
from jaxtron.plan.compiled.communication import CommunicationKey
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.plan import Plan
from jaxtron.plan.table import aligned
from jaxtron.words import plural, readable_bytes, readable_count, readable_flops, readable_seconds, readable_time

BAR = 30


def write_plan(plan: Plan, path: Path) -> None:
    """The plan as JSON, the file replaced whole."""
    write_whole(path, json.dumps(plan.json(), indent=1) + "\n")


def write_hlo(rehearsal: Rehearsal, path: Path) -> None:
    """The compiled, scheduled, partitioned program."""
    write_whole(path, rehearsal.hlo)


def plan_text(plan: Plan, tokens: float | None = None) -> str:
    """The plan for a reader; `tokens` is a budget whose days are told."""
    nodes = math.ceil(plan.num_gpus / plan.gpus_per_node)
    mesh = _mesh(plan.mesh)
    if plan.experts:
        mesh = f"{mesh}; experts: {_mesh(plan.experts)}"
    return "\n".join(
        [
            f"{plan.title}: {readable_count(plan.parameters)} parameters on {plan.num_gpus:,} {plan.gpu} "
            f"({plural(nodes, 'node')}), compiled with JAX {plan.jax_version} in {plan.rehearsal_seconds:.0f} s",
            f"mesh: {mesh}; {plan.schedule}",
            *plan.attention,
            *plan.choices,
            "",
            *_memory(plan),
            "",
            *_communication(plan),
            "",
            *_compute(plan),
            "",
            *_prediction(plan, tokens),
            "",
            *_bound(plan),
            "",
            *_diagnostics(plan),
        ]
    )


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{flag} {parts}" for flag, parts in sizes.items() if parts > 1) or "one device"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    rows = [
        (f"  {name}", readable_bytes(part), f"{part / memory.capacity:.1%}", "#" * round(BAR * part / memory.capacity))
        for name, part in memory.classes.items()
    ]
    lines = [
        f"memory of a GPU: {verdict}, {readable_bytes(memory.total)} of {readable_bytes(memory.capacity)} "
        f"({memory.total / memory.capacity:.0%}); JAX's pool may take {min(1.0, pool_fraction()):.0%}, communication "
        "buffers and reserve are the rest",
        *aligned(rows, right=(1, 2)),
    ]
    if len(memory.stages) > 1:
        fullest = max(memory.stages, key=lambda stage: stage.bytes)
        rows = [("  stage", "layers", "held", "activations")]
        for number in sorted({0, 1, len(memory.stages) // 2, len(memory.stages) - 1, memory.stages.index(fullest)}):
            stage = memory.stages[number]
            rows.append((f"  {number}", str(stage.layers), str(stage.held), readable_bytes(stage.bytes)))
        lines += ["  every stage makes room for the fullest one; what some of them fill of it:"]
        lines += aligned(rows, right=(1, 2, 3))
    return lines if plan.hint is None else [*lines, f"  change first: {plan.hint}"]


def _communication(plan: Plan) -> list[str]:
    if not plan.communication:
        return ["communication: none"]
    rows = [("  kind", "axes", "link", "loops", "runs", "payload", "sent", "async", "time", "hidden")]
    for row in plan.communication:
        rows.append(
            (
                f"  {row.key.kind}",
                ",".join(row.key.axes) or "-",
                row.link or "-",
                _loops(row.key),
                f"{row.executions:,}",
                readable_bytes(row.payload),
                readable_bytes(row.sent),
                f"{row.asynchronous}/{row.operations}",
                readable_seconds(row.seconds),
                f"{row.hidden / row.seconds:.0%}" if row.seconds else "-",
            )
        )
    sent = {link: sum(row.sent for row in plan.communication if row.link == link) for link in ("NVLink", "network")}
    total = " and ".join(f"{readable_bytes(part)} by {link}" for link, part in sent.items() if part)
    lines = [f"communication of a GPU in a step: sends {total or 'nothing'}", *aligned(rows, right=range(4, 10))]
    if plan.further:
        lines.append(
            f"  further rounds of experts ({plural(plan.further, 'communication')}) run only where choices are uneven: "
            "counted as none"
        )
    given, needed = plan.messages
    return [*lines, f"  stages send {given / needed:.2f} times the messages they need"] if needed else lines


def _loops(key: CommunicationKey) -> str:
    loops = " x ".join("?" if trips is None else str(trips) for trips in key.loops) or "once"
    return f"{loops} if" if key.conditional else loops


def _compute(plan: Plan) -> list[str]:
    found = plan.prediction
    again = found.hardware_flops / found.model_flops - 1
    parts = plan.prediction.breakdown
    bubble = parts.bubble / (parts.total - parts.bubble) if parts.total else 0.0
    model, hardware = readable_flops(found.model_flops), readable_flops(found.hardware_flops)
    what = "what is computed again and empty rows of experts" if plan.experts else "what is computed again"
    lines = [
        f"compute of a GPU in a step: {model} of the model ({plan.padding:.1%} for the vocabulary's padding), "
        f"{hardware} with {what} ({again:+.1%}); bubble {bubble:.1%}"
    ]
    if plan.compiled_flops is not None:
        ratio = plan.compiled_flops / found.model_flops - 1
        lines.append(
            f"  products of the compiled step: {readable_flops(plan.compiled_flops)} ({ratio:+.1%} against the model's)"
        )
    return lines


def _prediction(plan: Plan, tokens: float | None) -> list[str]:
    found = plan.prediction
    lines = [
        f"prediction: {readable_seconds(found.step_seconds)} a step, {found.tokens_per_second:,.0f} tokens/s, "
        f"MFU {found.mfu:.1%}, HFU {found.hfu:.1%}"
    ]
    parts = [
        (name, seconds)
        for name, seconds in dataclasses.asdict(found.breakdown).items()
        if seconds > 1e-6 * found.step_seconds
    ]
    rows = [
        (f"  {name}", readable_seconds(seconds), f"{seconds / found.step_seconds:.1%}")
        for name, seconds in sorted(parts, key=lambda part: -part[1])
    ]
    lines += aligned(rows, right=(1, 2))
    if plan.trained < plan.parameters:
        lines.append("  as if all parameters were trained: frozen ones take less")
    if tokens is not None:
        lines.append(f"  {readable_count(tokens)} tokens take {readable_time(found.seconds_for(tokens))}")
    return lines


def _bound(plan: Plan) -> list[str]:
    bound = plan.bound
    rows = [("  what", "seconds", "share", "read and written", "rate", "launches")]

    def row(name: str, seconds: float, moved: str, rate: str, launches: str) -> None:
        rows.append(
            (f"  {name}", readable_seconds(seconds), f"{seconds / bound.step_seconds:.1%}", moved, rate, launches)
        )

    for name, found in sorted(bound.classes.items(), key=lambda item: -item[1].seconds):
        moved = found.read + found.written
        if not found.seconds:
            rate = "hidden"
        elif found.flops:
            rate = f"{readable_flops(found.flops / found.seconds).removesuffix('s')}/s"
        else:
            rate = f"{readable_bytes(moved / found.seconds).removesuffix('s')}/s"
        row(name, found.seconds, readable_bytes(moved), rate, f"{found.launches:,}")
    for axes, travel in bound.communication.items():
        rate = f"of {readable_seconds(travel.seconds)}"
        row(f"exposed, {axes}", travel.exposed, f"{readable_bytes(travel.sent)} sent", rate, f"{travel.launches:,}")
    if bound.bubble:
        row("bubble", bound.bubble, "", "", "")
    found = plan.prediction
    return [
        f"bound of the compiled step, kernel by kernel: {readable_seconds(bound.step_seconds)} a step, "
        f"MFU at most {bound.mfu:.1%}; predicted are {readable_seconds(found.step_seconds)} and {found.mfu:.1%}",
        "  every kernel at the best rate assumed of its GPU and nothing between them: not a measurement",
        *aligned(rows, right=range(1, 6)),
    ]


def _diagnostics(plan: Plan) -> list[str]:
    if not plan.diagnostics:
        return ["diagnostics: none"]
    lines = ["diagnostics:"]
    for diagnostic in plan.diagnostics:
        place = f" ({diagnostic.location})" if diagnostic.location else ""
        lines.append(f"  {diagnostic.what}{place}")
    return lines

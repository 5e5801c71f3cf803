"""Plans and searches whose figures are made up: what draws them need not wait for a compiler."""

import math

from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.plan.compiled.bound import Bound, ClassBound, TravelBound
from jaxtron.plan.compiled.communication import CommunicationKey, CommunicationRow
from jaxtron.plan.compiled.diagnostics import Diagnostic
from jaxtron.plan.formula.prediction import Breakdown, Prediction
from jaxtron.plan.html.parts import PageParts
from jaxtron.plan.layout import ParameterRow
from jaxtron.plan.memory_use import MemoryUse, StageActivations
from jaxtron.plan.plan import Plan
from jaxtron.plan.search.candidates import CandidateLayout
from jaxtron.plan.search.search import Candidate, SearchResult
from jaxtron.run.configuration import Configuration

GIB = 2**30
# ends a script, begins what hides the next end, asks for a picture, and is a place of the template
MARKUP = "</script><!--<script><img src=x onerror=alert(1)>@@data@@"
# of the mesh below: sent by each device over each kind of communication
TENSOR, DATA, PIPE, EXCHANGE = 3 * GIB, 2 * GIB, 4 * GIB, 6 * GIB


def made_up_plan(
    title: str = "made_up", *, pipe: int = 4, microbatches: int = 8, schedule: str = "1f1b", chunks: int = 1
) -> tuple[Plan, PageParts]:
    """pipe x data 2 x tensor 4 devices in nodes of eight: tensor inside a node, stages between nodes."""
    mesh = {"pipe": pipe, "data": 2, "fsdp": 1, "context": 1, "tensor": 4}
    table = make_schedule(schedule, pipe, microbatches, chunks)
    slots = {"forward": 0.1, "backward": 0.2, **({"weight": 0.1} if table.split else {})}
    breakdown = Breakdown(products=2.5, memory=0.25, tensor=0.25, bubble=0.9, data=0.05, optimizer=0.05)
    prediction = Prediction(
        step_seconds=4.0,
        tokens_per_second=4096.0,
        model_flops=1e15,
        hardware_flops=1.1e15,
        mfu=0.25,
        hfu=0.275,
        breakdown=breakdown,
        slot_seconds={slot: [seconds] * table.num_virtual for slot, seconds in slots.items()},
    )
    rows = [
        _row("all_gather", ("tensor",), "NVLink", TENSOR),
        _row("all_reduce", ("data",), "NVLink", DATA),
        _row("collective_permute", ("pipe",), "network", PIPE),
        _row("all_to_all", ("data", "tensor"), "NVLink", EXCHANGE),
        _row("all_gather", ("?",), "network", 1.0),
    ]
    plan = Plan(
        title=title,
        mesh=mesh,
        experts={},
        gpu="h100",
        num_gpus=math.prod(mesh.values()),
        gpus_per_node=8,
        schedule=f"{schedule}, {microbatches} microbatches",
        jax_version="0.0",
        rehearsal_seconds=1.0,
        parameters=10**9,
        trained=10**9,
        memory=_memory(60, pipe),
        communication=rows,
        messages=(1, 1),
        prediction=prediction,
        bound=Bound(
            step_seconds=3.0,
            mfu=0.33,
            classes={"products": ClassBound(10, GIB, GIB, 10**15, 2.0)},
            communication={"tensor": TravelBound(4, 3 * GIB, 0.5, 0.4)},
            bubble=0.6,
            copies=(),
        ),
        compiled_flops=None,
        attention=("attention: made up",),
        choices=(),
        padding=0.0,
        diagnostics=[Diagnostic(f"copies {MARKUP}", GIB, "layers/attention.py:1")],
        further=0,
        hint=None,
    )
    axes = tuple(row.key.axes for row in rows)
    return plan, PageParts(_parameters(), table, {axis: size for axis, size in mesh.items() if size > 1}, axes)


def made_up_search(plan: Plan | None = None) -> SearchResult:
    """Eleven layouts by formula, one of them 30% too big, and beside them, with a plan, one that was compiled."""
    config = Configuration.model_validate({"mesh": {"data": 8}, "train": {"global_batch": 32}})
    formula = [
        _candidate(rows=2 ** (number % 4), tensor=1 + number, seconds=1.0 + 0.1 * number) for number in range(11)
    ]
    best = _candidate(rows=1, tensor=32, seconds=0.8)
    compiled = () if plan is None else (Candidate(best.layout, best.estimate, best.formula, plan),)
    return SearchResult(
        config=config,
        gpu="h100",
        num_gpus=32,
        gpus_per_node=8,
        candidates=tuple(formula),
        num_layouts=20,
        num_refused=2,
        num_too_big=6,
        own=formula[3],
        own_problem=None,
        compiled=compiled,
    )


def _row(kind: str, axes: tuple[str, ...], link: str, sent: float) -> CommunicationRow:
    return CommunicationRow(
        key=CommunicationKey(kind, axes, (8, None), True),
        link=link,  # type: ignore[arg-type]
        operations=2,
        arrays=2,
        executions=16,
        payload=round(sent),
        sent=sent,
        each=round(sent) // 8,
        asynchronous=1,
        seconds=0.5,
        hidden=0.25,
    )


def _memory(gib: int, stages: int = 1) -> MemoryUse:
    return MemoryUse(
        master_weights=10 * GIB,
        optimizer=20 * GIB,
        frozen=0,
        weights=5 * GIB,
        gradients=5 * GIB,
        activations=(gib - 46) * GIB,
        messages=GIB,
        batch=0,
        temporaries=GIB,
        communication=GIB,
        reserve=3 * GIB,
        capacity=79 * GIB,
        stages=tuple(StageActivations(2, stages - stage, (stages - stage) * GIB) for stage in range(stages)),
    )


def _parameters() -> tuple[ParameterRow, ...]:
    sizes = {"embedding.table": 50, "stack.mlp.up": 200, "stack.mlp.down": 100, "stack.query": 25, f"odd.{MARKUP}": 1}
    return tuple(
        ParameterRow(name, (size, 64), ("vocab", "embed"), (("tensor",), ()), "kernel", "trained", size * 64, 2, 0)
        for name, size in sizes.items()
    )


def _candidate(rows: int, tensor: int, seconds: float) -> Candidate:
    layout = CandidateLayout(
        data=1,
        fsdp=1,
        tensor=tensor,
        pipe=1,
        pipeline=PipelineConfig(),
        rows=rows,
        recompute="none",
        zero="optimizer",
    )
    breakdown = Breakdown(products=0.9 * seconds, bubble=0.1 * seconds)
    prediction = Prediction(seconds, 1e4, 1e15, 1e15, 0.3 / seconds, 0.3 / seconds, breakdown, {"forward": [0.1]})
    return Candidate(layout, _memory(50 + tensor), prediction)

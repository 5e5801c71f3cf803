"""`jaxtron.rehearse` and `jaxtron.search`: a run weighed before it runs, and layouts compared."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from jaxtron.api.devices import start_planning
from jaxtron.api.html import html_lines, html_table
from jaxtron.api.settings import Source, load
from jaxtron.api.tables import Edits, check_used, edited
from jaxtron.config import UserError, expand_home
from jaxtron.gpus import GPUS
from jaxtron.pictures.memory import memory
from jaxtron.pictures.mesh import mesh
from jaxtron.pictures.picture import Picture
from jaxtron.pictures.timeline import timeline
from jaxtron.pictures.traffic import traffic
from jaxtron.plan.compare import changes_text
from jaxtron.plan.compiled.communication import CommunicationRow
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.compiled.rehearsal import rehearse as compile_step
from jaxtron.plan.html.page import write_plan_page
from jaxtron.plan.html.parts import page_parts
from jaxtron.plan.machine import Machine, machine_named, read_machine
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.plan.plan import Plan, make_plan
from jaxtron.plan.report import plan_text, write_hlo, write_plan
from jaxtron.plan.request import PlanRequest
from jaxtron.plan.search.candidates import splits_sequences
from jaxtron.plan.search.ranking import ranking_text
from jaxtron.plan.search.search import Candidate, SearchResult, compile_best
from jaxtron.plan.search.search import search as search_by_formula
from jaxtron.plan.show import check_formula, filled, known_gpus
from jaxtron.plan.traffic import axis_sizes, flows
from jaxtron.run.configuration import Configuration
from jaxtron.words import plural, readable_bytes, readable_seconds

TITLE = "the configuration"


@dataclass(frozen=True, eq=False)
class StepPlan:
    """A training step compiled for GPUs that need not be there, and what it takes of one of them.

    Prints as the report of `python -m jaxtron.plan`, and shows its tables in a notebook.
    """

    config: Configuration
    """What was compiled: with more replicas than asked for where the GPUs hold them."""
    plan: Plan
    """All figures, as the page and the report have them."""
    rehearsal: Rehearsal

    @property
    def memory(self) -> MemoryUse:
        """Bytes of a GPU: `classes` by what they are for, `total`, `capacity`, `fits`."""
        return self.plan.memory

    @property
    def fits(self) -> bool:
        """Whether a GPU has so much memory."""
        return self.plan.memory.fits

    @property
    def collectives(self) -> list[CommunicationRow]:
        """What a GPU sends in a step, by kind, axes of the mesh and link: bytes, times, seconds, and what is hidden."""
        return self.plan.communication

    @property
    def times(self) -> dict[str, float]:
        """Seconds of the predicted step by what takes them, the bubble among them; `step` is the sum."""
        found = self.plan.prediction
        return {"step": found.step_seconds, **dataclasses.asdict(found.breakdown)}

    @property
    def hlo(self) -> str:
        """The compiled, scheduled, partitioned program."""
        return self.rehearsal.hlo

    def draw(self, what: str = "memory") -> Picture:
        """A picture: `memory` of a GPU, the pipeline's `timeline`, `traffic` between GPUs, the `mesh` on nodes.

        Raises `UserError` for another name.
        """
        plan, node = self.plan, self.plan.gpus_per_node
        if what == "memory":
            return memory(self.memory.classes, self.memory.capacity)
        if what == "timeline":
            return timeline(self.config.schedule(plan.mesh["pipe"]), plan.prediction.slot_seconds)
        if what == "traffic":
            return traffic(axis_sizes(plan), flows(plan), gpus_per_node=node)
        if what == "mesh":
            return mesh(plan.mesh, gpus_per_node=node)
        raise UserError(f"draw({what!r}): give memory, timeline, traffic or mesh")

    def compare(self, other: "StepPlan") -> str:
        """What changed in this plan against another, as text."""
        return changes_text(other.plan.json(), self.plan)

    def save(self, path: str | Path) -> Path:
        """Writes all figures as JSON; with a name that ends in .html a page for a browser, in .hlo the program."""
        path = Path(expand_home(str(path)))
        if path.suffix == ".hlo":
            write_hlo(self.rehearsal, path)
        elif path.suffix == ".html":
            found = self.plan
            where = f"gpu={found.gpu!r}, gpus={found.num_gpus}, gpus_per_node={found.gpus_per_node}"
            command = f"jaxtron.rehearse(config, {where}).save({str(path)!r})"
            write_plan_page(found, page_parts(self.rehearsal, found), path, command=command, text=str(self))
        else:
            write_plan(self.plan, path)
        return path

    def __str__(self) -> str:
        return plan_text(self.plan)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        plan, use = self.plan, self.memory
        head, mesh, *rest = plan_text(plan).split("\n\n")[0].split("\n")
        classes = [(name, size) for name, size in use.classes.items() if size]
        share = [(name, readable_bytes(size), f"{size / use.capacity:.1%}") for name, size in classes]
        verdict = "fits" if use.fits else "does not fit"
        title = f"memory of a GPU: {verdict}, {readable_bytes(use.total)} of {readable_bytes(use.capacity)}"
        sent = [
            (
                row.key.kind,
                ", ".join(row.key.axes) or "-",
                row.link or "-",
                f"{row.executions:,}",
                readable_bytes(row.sent),
                readable_seconds(row.seconds),
                f"{row.hidden / row.seconds:.0%}" if row.seconds else "-",
            )
            for row in self.collectives
        ]
        step = self.times["step"]
        times = [
            (name, readable_seconds(seconds), f"{seconds / step:.1%}")
            for name, seconds in sorted(self.times.items(), key=lambda item: -item[1])
            if seconds > 1e-6 * step
        ]
        found = plan.prediction
        speed = (
            f"prediction: {readable_seconds(step)} a step, {found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}"
        )
        hint = f"change first: {plan.hint}" if plan.hint else ""
        return "".join(
            [
                html_lines(head, mesh, *rest),
                html_table(("memory", "bytes", "share"), share, right=(1, 2), title=title),
                html_lines(hint),
                html_table(
                    ("collective", "axes", "link", "runs", "sent", "time", "hidden"),
                    sent,
                    right=(3, 4, 5, 6),
                    title="communication of a GPU in a step",
                ),
                html_table(("time", "seconds", "share"), times, right=(1, 2), title=f"prediction: {speed}"),
            ]
        )


@dataclass(frozen=True)
class SearchTable:
    """Layouts for so many GPUs, ranked; `best` is the first as a configuration, and it prints as the command does."""

    result: SearchResult
    """Everything that was found."""

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Those that were compiled and fit, or all that fit by formula where none was, the fastest first."""
        return self.result.ranked

    @property
    def best(self) -> Configuration:
        """The first's configuration, for `Session`, `rehearse` or a file."""
        return self.config(0)

    def config(self, rank: int) -> Configuration:
        """The configuration of one of `candidates`, 0 the first; a `UserError` where there is none."""
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < len(self.candidates):
            raise UserError(f"no candidate {rank!r}: there are {plural(len(self.candidates), 'candidate')}, from 0 on")
        return self.candidates[rank].layout.config(self.result.config)

    def __len__(self) -> int:
        return len(self.candidates)

    def __str__(self) -> str:
        return ranking_text(self.result, TITLE)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [
            (
                str(rank),
                one.layout.mesh_text,
                one.layout.order_text,
                one.layout.recompute_text,
                one.layout.zero_text,
                readable_seconds(one.prediction.step_seconds),
                f"{one.prediction.mfu:.1%}",
                readable_bytes(one.memory.total),
            )
            for rank, one in enumerate(self.candidates[:20])
        ]
        header = ("", "mesh", "schedule", "recompute", "zero", "step", "MFU", "memory")
        title = f"layouts of {self.result.num_gpus:,} {self.result.gpu}, {len(self.candidates):,} ranked"
        return html_table(header, rows, right=(5, 6, 7), title=title)


def rehearse(
    config: Source | None = None,
    *,
    gpu: str = "h100",
    nodes: int | None = None,
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    machine: str | Path | None = None,
    parameters: Edits | None = None,
    activations: Edits | None = None,
) -> StepPlan:
    """Compiles the real step of a configuration for GPUs that need not be there, and weighs it.

    `config` is what `load` takes. `gpu` is a name (a100, h100, h200, b200, gb200) or a file of XLA's; `nodes` of
    `gpus_per_node` (none: 8) or `gpus` in all (none: as many as the mesh asks for). A mesh that fewer GPUs fill is
    repeated along `data`, and the batch with it. `machine` is a file of the time model's constants
    (docs/prediction.md). `parameters` and `activations` are edits of the tables, as `Session` takes them: memory,
    collectives and the bound are then those of the edited program, and the predicted times those of the tables as they
    are. It takes seconds to minutes and needs JAX's CUDA plugin (`pip install jaxtron[plan]`), no GPU.
    Raises `UserError` where it does not fit the GPUs' number, or a name is unknown. A plan that exceeds the memory is
    no error: `fits` tells.
    """
    config, request, num_gpus = _request(config, gpu, nodes, gpus, gpus_per_node, machine)
    constants = _machine(request)
    start_planning(config)
    config = filled(config, num_gpus, lambda line: None)
    node_size = min(request.node_size, num_gpus)
    tables = edited(config, parameters, activations)
    rehearsal = compile_step(config, gpu=gpu, num_gpus=num_gpus, gpus_per_node=node_size, tables=tables)
    check_used(rehearsal.session, parameters)
    return StepPlan(config, make_plan(rehearsal, constants, TITLE), rehearsal)


def search(
    config: Source | None = None,
    *,
    gpu: str = "h100",
    nodes: int | None = None,
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    machine: str | Path | None = None,
    top: int = 3,
) -> SearchTable:
    """Meshes, schedules, recompute and ZeRO levels for so many GPUs: all that fit, ranked by predicted time.

    The arguments are `rehearse`'s. The best `top` and the configuration's own layout are compiled and ranked among
    themselves; with 0 nothing is compiled, and the ranking is by formula, in seconds. Raises `UserError` where no
    layout fits, or JAX runs on fewer simulated devices than a layer is traced on: call `simulate` with more first.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise UserError(f"top {top!r}: give how many layouts are compiled, 0 for none")
    config, request, num_gpus = _request(config, gpu, nodes, gpus, gpus_per_node, machine)
    constants = _machine(request)
    # a layer split by tensor is traced on as many devices, and on twice as many where sequences are split too
    widest = max(request.node_size, config.mesh.tensor)
    start_planning(config, devices=max(8, widest * (1 + splits_sequences(config))))
    node_size = min(request.node_size, num_gpus)
    found = search_by_formula(config, constants, num_gpus=num_gpus, gpus_per_node=node_size)

    def compiled(config: Configuration) -> Plan:
        rehearsal = compile_step(config, gpu=gpu, num_gpus=num_gpus, gpus_per_node=found.gpus_per_node)
        return make_plan(rehearsal, constants, TITLE)

    return SearchTable(compile_best(found, top, compiled) if top else found)


def _request(
    config: Source | None,
    gpu: str,
    nodes: int | None,
    gpus: int | None,
    gpus_per_node: int | None,
    machine: str | Path | None,
) -> tuple[Configuration, PlanRequest, int]:
    """The configuration, the planner's request, and how many GPUs there are; a `UserError` for what cannot be."""
    for name, count in (("nodes", nodes), ("gpus", gpus), ("gpus_per_node", gpus_per_node)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise UserError(f"{name} {count!r}: give a whole number above 0")
    if not isinstance(gpu, str) or not gpu:
        raise UserError(f"gpu {gpu!r}: give one of {', '.join(GPUS)}, or a file of XLA's target description")
    config = config if isinstance(config, Configuration) else load(config)
    check_formula(config)
    path = None if machine is None else Path(expand_home(str(machine)))
    request = PlanRequest("plan", [], gpu=gpu, gpus=gpus, nodes=nodes, gpus_per_node=gpus_per_node, machine=path)
    return config, request, request.num_gpus(known_gpus(config))


def _machine(request: PlanRequest) -> Machine:
    assert request.gpu is not None
    return machine_named(request.gpu) if request.machine is None else read_machine(request.machine)

"""What each kind of request shows: a plan, a layout, a schedule, a search."""

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from jaxtron.command import check_output
from jaxtron.config import UserError, take_file
from jaxtron.gpus import GPUS
from jaxtron.pipeline.schedules.table_file import write_csv
from jaxtron.plan.compare import changes_text, read_plan
from jaxtron.plan.compiled.rehearsal import rehearse
from jaxtron.plan.formula.activations import layer_bytes
from jaxtron.plan.formula.calibrate import calibrate, measured_seconds, write_machine
from jaxtron.plan.html.page import write_plan_page, write_search_page
from jaxtron.plan.html.parts import PageParts, page_parts
from jaxtron.plan.layout import layout_text
from jaxtron.plan.machine import Machine, machine_named, read_machine
from jaxtron.plan.plan import Plan, make_plan, profile_of
from jaxtron.plan.report import plan_text, write_hlo, write_plan
from jaxtron.plan.request import PlanRequest
from jaxtron.plan.schedule import draw_schedule, schedule_text
from jaxtron.plan.search.candidates import splits_sequences
from jaxtron.plan.search.ranking import ranking_text, write_ranking
from jaxtron.plan.search.search import compile_best, search
from jaxtron.run.configuration import Configuration, configuration_type
from jaxtron.run.session import make_session
from jaxtron.runtime.devices import simulate_devices
from jaxtron.runtime.start import start_compiler, start_runtime
from jaxtron.sharding.folding import FLAGS
from jaxtron.words import readable_bytes


def show_plan(config: Configuration, request: PlanRequest) -> None:
    """The step compiled for the GPUs, and what it takes of them."""
    if request.gpu is None:
        known = ", ".join(GPUS)
        raise UserError(f"say for which GPU: --gpu {known} or a target's file; or --layout, --schedule")
    check_formula(config)
    earlier = None if request.compare is None else read_plan(request.compare)
    machine = _machine(request)
    num_gpus, fitted = request.num_gpus(known_gpus(config)), None
    if request.calibrate is not None:
        fitted = request.calibrate.with_name("machine.yaml")
        check_output("machine.yaml beside --calibrate", fitted)
    start_compiler(config.runtime)
    config = filled(config, num_gpus)
    node_size = min(request.node_size, num_gpus)
    if request.calibrate is not None:
        # before the compiler is kept waiting for
        measured_seconds(request.calibrate, config, machine.datasheet, num_gpus)
    rehearsal = rehearse(config, gpu=request.gpu, num_gpus=num_gpus, gpus_per_node=node_size)
    if request.calibrate is not None:
        assert fitted is not None
        profile, sizes = profile_of(rehearsal, machine), rehearsal.session.sizes
        machine = calibrate(request.calibrate, config, sizes, machine, gpus_per_node=node_size, profile=profile)
        write_machine(machine, fitted)
    plan = make_plan(rehearsal, machine, _title(request))
    text = plan_text(plan, request.tokens)
    if earlier is not None:
        text = f"{text}\n\n{changes_text(earlier, plan)}"
    print(text)
    if request.html is not None:
        told = {"command": request.command, "text": text, "tokens": request.tokens}
        write_plan_page(plan, page_parts(rehearsal, plan), request.html, **told)
    if request.json is not None:
        write_plan(plan, request.json)
    if request.hlo is not None:
        write_hlo(rehearsal, request.hlo)
    if request.png is not None:
        draw_schedule(config.schedule(plan.mesh["pipe"]), request.png, seconds=plan.prediction.slot_seconds)
    _tell_written(request.html, request.json, request.hlo, request.png, fitted)


def show_layout(config: Configuration, request: PlanRequest) -> None:
    """Every parameter's layout on the machine's devices, or simulated ones."""
    start_runtime(config.runtime, devices=config.devices)
    session = make_session(config, jax.devices())
    with session.use():
        print(layout_text(session.blueprint))


def show_schedule(config: Configuration, request: PlanRequest) -> None:
    """The schedule drawn, without devices: simulated ones tell the bytes of a layer."""
    sizes = config.mesh.shape(config.devices or known_gpus(config))
    config.check_mesh(sizes)
    table, stages = config.schedule(sizes["pipe"]), config.stage_plan(sizes["pipe"])
    # where sequences are split, two parts of one stand for all
    start_runtime(config.runtime, devices=config.devices or sizes["tensor"] * min(2, sizes["context"]))
    each = layer_bytes(config, sizes)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    width, color = shutil.get_terminal_size((120, 24)).columns, sys.stdout.isatty()
    if request.csv is not None:
        write_csv(table, request.csv)
    if request.png is not None:
        draw_schedule(table, request.png)
    print(f"mesh: {mesh}")
    sizes_of = iter(each)
    stacks = [(stack, [(part, next(sizes_of)) for part in stack.alike]) for stack in stages.partitions]
    # a chunk takes the room of the longest of its stack, or of the most layers of each kind
    chunks = [
        sum(part.slots_per_chunk * size for part, size in parts)
        for stack, parts in stacks
        for _ in range(stack.num_chunks)
    ]
    print(schedule_text(table, width=width, color=color, chunk_bytes=chunks))
    for name, (stack, parts) in zip(config.family.stacks(config.model), stacks, strict=True):
        if stack.kinds:
            print(f"layers    {_lengths(stack.lengths)}")
        for kind, (part, size) in zip(stack.by_kind or [name], parts, strict=True):
            which = f"{kind}: " if stack.kinds or len(stacks) > 1 else ""
            kept = readable_bytes(size)
            print(f"layers    {which}{_lengths(part.lengths)}; one keeps {kept} of a microbatch on a device")
    if stages.num_stages > 1:
        print("memory    one program runs on all stages, so every device makes room for the fullest one's activations")
    _tell_written(request.csv, request.png)


def show_search(config: Configuration, request: PlanRequest) -> None:
    """Layouts for the GPUs, ranked by formula and the best of them compiled."""
    if request.gpu is None:
        raise UserError(f"say for which GPU: --gpu {', '.join(GPUS)}")
    check_formula(config)
    machine, num_gpus = _machine(request), request.num_gpus(known_gpus(config))
    start_compiler(config.runtime)
    # a layer split by tensor is traced on as many devices, and on twice as many where sequences are split too
    widest = max(request.node_size, config.mesh.tensor)
    simulate_devices(max(8, widest * (1 + splits_sequences(config))))
    found = search(config, machine, num_gpus=num_gpus, gpus_per_node=min(request.node_size, num_gpus))
    kept: list[tuple[Plan, PageParts]] = []

    def compiled(config: Configuration) -> Plan:
        assert request.gpu is not None
        rehearsal = rehearse(config, gpu=request.gpu, num_gpus=num_gpus, gpus_per_node=found.gpus_per_node)
        plan = make_plan(rehearsal, machine, _title(request))
        kept.append((plan, page_parts(rehearsal, plan)))
        return plan

    found = compile_best(found, request.top or 3, compiled)
    text = ranking_text(found, _title(request), request.tokens)
    print(text)
    if request.html is not None:
        parts = next((parts for plan, parts in kept if plan is found.best.plan), None)
        told = {"command": request.command, "text": text, "tokens": request.tokens}
        write_search_page(found, parts, request.html, title=_title(request), **told)
    if request.json is not None:
        write_ranking(found, _title(request), request.json)
    _tell_written(request.html, request.json)


SHOW: dict[str, Callable[[Configuration, PlanRequest], None]] = {
    "plan": show_plan,
    "layout": show_layout,
    "schedule": show_schedule,
    "search": show_search,
}


def check_formula(config: Configuration) -> None:
    """`UserError` for models whose time no formula knows."""
    if config.family.work is None:
        raise UserError(
            f"model.family {config.model.family} does not say what work a step has (Family.work), so that no time is "
            "predicted; --layout and --schedule show it all the same"
        )


def known_gpus(config: Configuration) -> int:
    """Devices that the mesh asks for, axes left open counting as one."""
    return math.prod(size for size in (getattr(config.mesh, axis) for axis in FLAGS) if size != -1)


def filled(config: Configuration, num_gpus: int, tell: Callable[[str], None] = print) -> Configuration:
    """The configuration with as many replicas of its mesh as the GPUs hold; the batch grows with them."""
    known = known_gpus(config)
    is_open = -1 in (getattr(config.mesh, axis) for axis in FLAGS)
    if is_open or num_gpus <= known or num_gpus % known:
        return config
    mesh = config.mesh.model_copy(update={"data": config.mesh.data * num_gpus // known})
    train = config.train.model_copy(update={"global_batch": config.train.global_batch * num_gpus // known})
    flags = f"--mesh.data {mesh.data} --train.global_batch {train.global_batch}"
    tell(f"{num_gpus:,} GPUs hold {num_gpus // known:,} of this mesh: {flags}")
    return config.model_copy(update={"mesh": mesh, "train": train})


def _machine(request: PlanRequest) -> Machine:
    if request.machine is not None:
        return read_machine(request.machine)
    assert request.gpu is not None
    return machine_named(request.gpu)


def _title(request: PlanRequest) -> str:
    path, _ = take_file(configuration_type(request.words), request.words)
    return path.stem if path else "the default configuration"


def _lengths(lengths: tuple[int, ...]) -> str:
    first, *others = lengths
    if not others:
        return f"{first} in one part"
    if set(others) == {first}:
        return f"{first} in each of {len(lengths)} parts"
    return f"{', '.join(map(str, lengths))} in the parts"


def _tell_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            print(f"written   {path}")

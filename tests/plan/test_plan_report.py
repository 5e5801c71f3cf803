"""What a plan says of a compiled step: memory by class, links, what is hidden, and what nobody asked for."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.gpus import GPUS, gpu_named
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.tick_loops import reached, tick_loops
from jaxtron.plan.compare import changes_text, read_plan
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.bound import WholeCopy
from jaxtron.plan.compiled.communication import communication_rows, compiled_overlap
from jaxtron.plan.compiled.diagnostics import diagnostics
from jaxtron.plan.compiled.links import link
from jaxtron.plan.compiled.overlap import products_beside
from jaxtron.plan.compiled.rehearsal import Rehearsal, rehearse
from jaxtron.plan.hint import first_change
from jaxtron.plan.machine import machine_named
from jaxtron.plan.plan import make_plan
from jaxtron.plan.report import plan_text, write_plan
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.mesh import abstract_mesh
from jaxtron.sharding.rules import make_rules

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS, HIDDEN, LENGTH, VOCAB, MICROBATCHES = 4, 512, 256, 1024, 4
ROWS = 2
MESH = {"pipe": 2, "data": 2, "tensor": 2}


def configuration(**changes: dict) -> Configuration:
    settings = {
        "model": {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_heads": 8,
            "vocab_size": VOCAB,
            "position": "rotary",
            "bias": False,
        },
        "data": {"sequence_length": LENGTH},
        "train": {"global_batch": ROWS * MICROBATCHES * 2, "microbatches": MICROBATCHES, "precision": "bf16"},
        "mesh": MESH,
        "sharding": {"zero": "none"},
    }
    return Configuration.model_validate(settings | changes)


@functools.cache
def step(zero: str = "none") -> Rehearsal:
    return rehearse(configuration(sharding={"zero": zero}), gpu="h100", num_gpus=8, gpus_per_node=4)


def test_memory_by_class_is_what_the_compiler_planned() -> None:
    use, compiled = step().memory_use, step().memory
    assert use.program == compiled.peak and use.temporaries > 0
    # a stage's matrices and norms, its tensor part of them, and of the embedding, which both stages use and share
    matrices, table = 12 * HIDDEN**2 * LAYERS // 2 // 2, VOCAB * HIDDEN // 2
    norms = 2 * HIDDEN * LAYERS // 2 + HIDDEN
    assert use.master_weights == 4 * (matrices + norms + table // 2)
    assert use.gradients == 4 * (matrices + norms + table)
    # two moments for each, and the counters
    assert 0 <= use.optimizer - 2 * use.master_weights <= 64
    # matrices in bf16, norms as they lie at rest
    assert use.weights == 2 * (matrices + table)
    assert use.fits and use.total == sum(use.classes.values())


def test_activations_are_those_of_the_stages() -> None:
    use = step().memory_use
    assert [(stage.layers, stage.held) for stage in use.stages] == [(2, 2), (2, 1)]
    assert use.stages[0].bytes == use.activations == 2 * use.stages[1].bytes


@pytest.mark.slow
def test_sharing_the_optimizer_halves_it() -> None:
    whole, shared = step().memory_use, step("optimizer").memory_use
    # the norms are not shared
    for name in ("master_weights", "optimizer"):
        assert getattr(shared, name) == pytest.approx(getattr(whole, name) / 2, rel=0.01)
    assert shared.weights == pytest.approx(whole.weights, rel=0.01)
    assert step("optimizer").memory_use.program == step("optimizer").memory.peak


def test_links_follow_the_order_of_devices_in_nodes() -> None:
    both = {"pipe": 2, "data": 2, "tensor": 4}
    assert [link(both, (axis,), 8) for axis in both] == ["network", "NVLink", "NVLink"]
    assert [link(both, (axis,), 4) for axis in both] == ["network", "network", "NVLink"]
    assert link(both, ("tensor",), 2) == link(both, ("data", "tensor"), 4) == link(both, ("?",), 16) == "network"
    assert link(both, (), 4) is None and link(both, ("pipe", "tensor"), 16) == "NVLink"


PROGRAM = """HloModule m, is_scheduled=true, num_partitions=2

%fused (p: f32[8,4], q: f32[4,2]) -> f32[8,2] {
  %p = f32[8,4] parameter(0)
  %q = f32[4,2] parameter(1)
  ROOT %dot.1 = f32[8,2] dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
  %a = f32[8,4] parameter(0)
  %b = f32[4,2] parameter(1)
  %one = (f32[8,4], f32[16,4]) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}
  %fusion.1 = f32[8,2] fusion(%a, %b), kind=kCustom, calls=%fused
  %two = (f32[8,4], f32[16,4]) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}
  %one.done = f32[16,4] all-gather-done(%one)
  %gemm = (f32[8,2], s8[1]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %two.done = f32[16,4] all-gather-done(%two)
  ROOT %sum = f32[8,2] add(%fusion.1, %fusion.1)
}
"""


def test_products_beside_a_communication_are_those_between_its_start_and_its_end() -> None:
    product = 2 * 8 * 4 * 2
    assert products_beside(hlo.parse(PROGRAM)) == {"one": product, "two": product}
    late = PROGRAM.replace("%one.done = f32[16,4] all-gather-done(%one)", "%nothing = f32[] constant(0)")
    late = late.replace("  ROOT %sum", "  %one.done = f32[16,4] all-gather-done(%one)\n  ROOT %sum")
    assert products_beside(hlo.parse(late)) == {"one": 2 * product, "two": product}


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zero_bubble"])
def test_ticks_at_which_a_stage_comes_by_its_work(name: str) -> None:
    lowered = lower(make_schedule(name, 4, 8))
    ticks = sum(loop.num_iterations * loop.period for loop in tick_loops(lowered))
    for kind in ("forward", "backward", "weight"):
        entries = getattr(lowered, kind).active.sum(0).max()
        assert entries <= reached(lowered, kind) <= ticks


def test_traffic_counts_chosen_work_as_often_as_a_stage_has_it() -> None:
    rows = communication_rows(step(), machine_named("h100"))
    layers = [row for row in rows if row.key.axes == ("tensor",) and row.key.conditional and len(row.key.loops) == 2]
    # 2 gathers and 2 scatters a layer forward, 4 and 2 backward, for each microbatch and layer of a stage
    runs = {
        kind: sum(row.arrays * row.executions / row.operations for row in layers if row.key.kind == kind)
        for kind in ("all_gather", "reduce_scatter")
    }
    assert runs == {"all_gather": 6 * MICROBATCHES * LAYERS // 2, "reduce_scatter": 4 * MICROBATCHES * LAYERS // 2}
    assert {row.link for row in rows if row.key.axes == ("pipe",)} == {"network"}
    assert {row.link for row in layers} == {"NVLink"}
    assert all(0 <= row.hidden <= row.seconds for row in rows)


def test_the_compiled_overlap_reaches_the_prediction() -> None:
    machine = machine_named("h100")
    plan = make_plan(step(), machine, "mine")
    bare = tuple(dataclasses.replace(entry, beside=0) for entry in step().collectives)
    exposed = make_plan(dataclasses.replace(step(), collectives=bare), machine, "mine")
    assert sum(row.hidden for row in plan.communication) > 0 == sum(row.hidden for row in exposed.communication)
    assert plan.prediction.step_seconds < exposed.prediction.step_seconds


@pytest.mark.slow
def test_surprises_of_a_clean_step_are_its_copies() -> None:
    assert not [found for found in diagnostics(step("optimizer")) if "whole on" not in found.what]
    found = diagnostics(dataclasses.replace(step(), gpu=dataclasses.replace(gpu_named("h100"), memory_bytes=2**20)))
    shared = [diagnostic.what for diagnostic in found if "on all 2 of data" in diagnostic.what]
    assert len(shared) == 1 and "--sharding.zero optimizer" in shared[0]
    assert not [diagnostic for diagnostic in found if "on all 2 of pipe: the state of embedding" in diagnostic.what]


def test_whole_copies_are_told_with_their_place() -> None:
    copy = WholeCopy("transposes bf16[64,2048]", 3, 2**30, 0.25, "layer.py:7")
    (found,) = [one for one in diagnostics(step(), copies=[copy]) if one.location == "layer.py:7"]
    assert found.what == "XLA transposes bf16[64,2048], 3 GiB read and written by 3 runs a step: 250 ms at least"
    assert found.bytes == 3 * 2**30


def test_planted_surprises_are_told_with_their_place() -> None:
    entry = max(step().collectives, key=lambda entry: entry.bytes)
    wrong = dataclasses.replace(entry, kind="all_to_all", bytes=2**24, loops=(3,), location="model.py:12")
    message = (
        "W0 spmd.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot go from sharding {a} to {b} "
        'efficiently for HLO operation: %x.1 = f32[8] copy(%y), metadata={op_name="jit(step)/mine" '
        'source_file="layer.py" source_line=7}. '
    )
    planted = dataclasses.replace(step(), collectives=(wrong,), messages=(message, message))
    found = {(diagnostic.location, diagnostic.bytes): diagnostic.what for diagnostic in diagnostics(planted)}
    assert "all_to_all over" in found["model.py:12", 3 * 2**24] and "48 MiB" in found["model.py:12", 3 * 2**24]
    assert "whole copy of jit(step)/mine" in found["layer.py:7", 0]
    quiet = [
        diagnostic.what for diagnostic in diagnostics(planted) if "communicates nothing over it" in diagnostic.what
    ]
    assert sorted(what.split()[0] for what in quiet) == sorted(
        f"mesh.{axis}" for axis in MESH if axis not in wrong.axes
    )


def test_a_plan_as_text_and_json_and_against_another(tmp_path: Path) -> None:
    machine = machine_named("h100")
    before, after = (make_plan(step(zero), machine, "mine") for zero in ("none", "optimizer"))
    write_plan(before, tmp_path / "a.json")
    plain = json.loads((tmp_path / "a.json").read_text())
    assert plain["memory"]["total"] == before.memory.total and plain["prediction"]["mfu"] == before.prediction.mfu
    text = plan_text(before, 1e9)
    for words in (
        "fits",
        "activations in flight",
        "collective_permute",
        "NVLink",
        "network",
        "MFU",
        "1.00 billion tokens take",
        "times the",
        "bound of the compiled step, kernel by kernel: ",
        "MFU at most",
        "not a measurement",
        "exposed, tensor",
        "  bubble",
    ):
        assert words in text
    classes = plain["bound"]["classes"]
    assert {"products", "attention", "elementwise", "copies", "buffers", "fills"} <= classes.keys()
    assert set(classes["products"]) == {"launches", "read", "written", "flops", "seconds"}
    changes = changes_text(read_plan(tmp_path / "a.json"), after)
    # what the step gathers once: the weights that the optimizer's parts were
    gathered = [line for line in changes.splitlines() if "all_gather over data once a step" in line]
    assert len(gathered) == 1 and "0 B" in gathered[0] and "+" in gathered[0]
    assert "memory, optimizer" in changes and "-" in changes
    assert "step time, bound" in changes and "MFU, bound" in changes and "bound, elementwise" in changes
    assert changes_text(read_plan(tmp_path / "a.json"), before) == "changes: none"


def test_advice_names_the_largest_class() -> None:
    config, sizes = configuration(), {**MESH, "fsdp": 1, "context": 1}
    use = step().memory_use
    large = 2**40
    assert "--sharding.zero optimizer" in first_change(config, sizes, dataclasses.replace(use, optimizer=large))
    assert "--model.recompute selective" in first_change(config, sizes, dataclasses.replace(use, activations=large))
    assert "--train.microbatches 8" in first_change(config, sizes, dataclasses.replace(use, temporaries=large))


def test_advice_for_long_sequences_is_to_split_them() -> None:
    config = load(Configuration, CONFIGS / "llama3_8b_128k.yaml", ["--model.recompute", "full"])
    sizes = {"pipe": 1, "data": 1, "fsdp": 8, "tensor": 1}
    use = dataclasses.replace(step().memory_use, activations=2**40)
    assert first_change(config, sizes | {"context": 8}, use).startswith("--mesh.context 16, on more GPUs")
    assert first_change(config, sizes | {"context": 16}, use).startswith("more of mesh.tensor or mesh.pipe")


def test_what_parts_of_a_sequence_share_is_hidden_where_it_runs_beside_products() -> None:
    """With `mesh.context` alone gradients are summed over it, once a step."""
    machine = machine_named("h100")
    entry = max(step().collectives, key=lambda entry: entry.bytes)
    once = dataclasses.replace(entry, kind="reduce_scatter", axes=("context",), group_size=2, loops=(), beside=10**18)
    rules = make_rules(abstract_mesh(MeshConfig(data=1, context=2), 2), ShardingConfig())
    session = dataclasses.replace(step().session, rules=rules)
    for beside, part in ((10**18, 1.0), (0, 0.0)):
        planted = dataclasses.replace(once, beside=beside, asynchronous=True, conditional=False)
        rehearsal = dataclasses.replace(step(), collectives=(planted,), session=session)
        assert compiled_overlap(rehearsal, machine).data == part


def test_a_gpu_from_its_target_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.textproto"
    path.write_text(GPUS["h100"].target_config.replace("core_count: 132", "core_count: 66"))
    gpu = gpu_named(str(path))
    assert (gpu.name, gpu.num_cores, gpu.memory_bytes) == ("mine", 66, GPUS["h100"].memory_bytes)
    assert gpu.peak_flops == pytest.approx(GPUS["h100"].peak_flops / 2)
    assert machine_named(str(path)).datasheet == gpu

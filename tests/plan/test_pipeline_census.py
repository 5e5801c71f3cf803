"""A pipelined step compiled for eight H100s: its messages, its other traffic, and its memory."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.layers.moe.experts import FURTHER_ROUNDS
from jaxtron.models.work.profile import JAXTRON
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.names import BACKWARD
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.plan.compiled import flops, hlo
from jaxtron.plan.compiled.bound import Bound, step_bound
from jaxtron.plan.compiled.census import Collective
from jaxtron.plan.compiled.rehearsal import Rehearsal, rehearse
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.machine import machine_named
from jaxtron.run.configuration import Configuration

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS, HIDDEN, LENGTH, ROWS, PIPE, TENSOR = 8, 1024, 512, 2, 4, 2
LAYERS_A_STAGE = LAYERS // PIPE
# what one GPU of a stage sends: its tensor part of the microbatch's activations, bfloat16
MESSAGE = ROWS * LENGTH * HIDDEN // TENSOR * 2


@functools.cache
def step(schedule: str = "1f1b", microbatches: int = 8, chunks: int = 1) -> Rehearsal:
    config = Configuration.model_validate(
        {
            "model": {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_heads": 8, "vocab_size": 1024},
            "data": {"sequence_length": LENGTH},
            "train": {"global_batch": ROWS * microbatches, "microbatches": microbatches, "precision": "bf16"},
            "mesh": {"pipe": PIPE, "tensor": TENSOR, "data": 1},
            "pipeline": {"schedule": schedule, "chunks": chunks},
        }
    )
    return rehearse(config, gpu="h100", num_gpus=PIPE * TENSOR)


def messages(rehearsal: Rehearsal) -> list[Collective]:
    return [entry for entry in rehearsal.collectives if entry.kind == "collective_permute"]


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("eager_1f1b", marks=pytest.mark.slow)])
def test_a_tick_sends_one_message_each_way_beside_its_work(schedule: str) -> None:
    rehearsal = step(schedule)
    lowered = lower(make_schedule(schedule, PIPE, 8))
    sent = messages(rehearsal)
    assert {(entry.axes, entry.bytes) for entry in sent} == {(("pipe",), MESSAGE)}
    # per tick at most one of activations and one of gradients
    assert sum(entry.executions for entry in sent) <= 2 * lowered.schedule.num_ticks
    assert all(entry.asynchronous for entry in sent)


WORK = re.compile(r" (conditional|while)\(")


def overlapped(hlo: str) -> tuple[int, int]:
    """Permutations with a stage's work between their start and their end, and all, in ticks that have two kinds of it.

    Work is a choice, or a loop over layers where every stage has it. A tick of forwards alone has nothing beside.
    """
    beside = total = 0
    for body in re.split(r"\n(?=%|ENTRY)", hlo):
        lines = [line for line in body.split("\n") if re.search(r" (conditional|while|collective-permute-\w+)\(", line)]
        if sum(WORK.search(line) is not None for line in lines) < 2:
            continue
        for index, line in enumerate(lines):
            if started := re.search(r"(%collective-permute-start[\w.\-]*) =", line):
                end = next(place for place, other in enumerate(lines) if f"-done({started[1]})" in other)
                total += 1
                beside += any(WORK.search(other) for other in lines[index:end])
    return beside, total


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("eager_1f1b", marks=pytest.mark.slow)])
def test_messages_travel_while_stages_work(schedule: str) -> None:
    beside, total = overlapped(step(schedule).hlo)
    assert total > 0 and beside == total


@pytest.mark.slow
def test_memory_does_not_grow_with_microbatches() -> None:
    few, many = step(microbatches=8).memory.temporaries, step(microbatches=32).memory.temporaries
    # but for the tokens themselves
    tokens = 24 * ROWS * LENGTH * 4 * 8
    assert many - few <= tokens


@pytest.mark.slow
def test_tensor_traffic_of_a_stage_is_that_of_its_layers() -> None:
    """In each tick's work: 2 all-gathers and 2 reduce-scatters a layer forward, 4 and 2 backward (2205.05198)."""
    entries = [entry for entry in step().collectives if entry.axes == ("tensor",) and entry.bytes >= MESSAGE]
    in_layers = [entry for entry in entries if entry.loops and entry.loops[-1] == LAYERS_A_STAGE]
    assert entries
    ticks = {entry.loops[0] for entry in in_layers}
    for kind, a_layer in (("all_gather", 6), ("reduce_scatter", 4)):
        found = [entry for entry in in_layers if entry.kind == kind]
        # two ticks an iteration, each with a forward and a backward
        assert sum(entry.operands for entry in found) == 2 * a_layer, ticks


@functools.cache
def experts_step() -> Rehearsal:
    """Layers of Qwen2-57B without their shared MLP, a forward and a backward together."""
    flags = (
        "--model.num_layers 8 --model.vocab_size 1024 --model.moe.shared_size 0 --train.global_batch 32 "
        "--train.microbatches 8 --mesh.data 4 --mesh.tensor 1 --mesh.pipe 2 --pipeline.schedule eager_1f1b "
        "--pipeline.chunks 1 --pipeline.overlap true"
    )
    found = load(Configuration, CONFIGS / "qwen2_57b_a14b.yaml", flags.split())
    return rehearse(found.resolved(), gpu="h100", num_gpus=8)


@pytest.mark.slow
def test_tokens_of_one_microbatch_travel_to_experts_beside_products_of_the_other() -> None:
    """Whose products alone would do."""
    module = experts_step().module
    bodies = [list(exchanges(module, instructions)) for instructions in module.computations.values()]
    # the loops over layers of ticks that have both: out and back of each; beside the backward's way out is its own
    # attention, which is computed again
    together = [sent for sent in bodies if {is_backward for is_backward, _ in sent} == {False, True}]
    assert together
    for sent in together:
        ways = {one: [beside for is_backward, beside in sent if is_backward is one] for one in (False, True)}
        assert [len(found) for found in ways.values()] == [2, 2]
        assert all(sum(out.values()) > 0 for out, _ in ways.values())
        assert sum(beside[not is_backward] > 0 for is_backward, beside in sent) >= 2


def held_together(bound: Bound) -> float:
    """What a bound says that a step is made of, in seconds."""
    kernels = sum(found.seconds for found in bound.classes.values())
    return kernels + sum(found.exposed for found in bound.communication.values()) + bound.bubble


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [
        ("1f1b", 1),
        pytest.param("zero_bubble", 1, marks=pytest.mark.slow),
        pytest.param("interleaved", 2, marks=pytest.mark.slow),
    ],
)
def test_the_bound_counts_a_stage_that_waits_as_its_schedule_does(schedule: str, chunks: int) -> None:
    rehearsal, machine, microbatches = step(schedule, 8, chunks), machine_named("h100"), 8
    bound = step_bound(rehearsal, machine, 1e12)
    tokens = ROWS * LENGTH
    layer = 3 * 2 * tokens * 12 * HIDDEN**2 // TENSOR
    # the last stage has the head, whose vocabulary is split
    head = 3 * 2 * tokens * HIDDEN * 1024 // TENSOR
    multiplied = bound.classes["products"].flops
    assert multiplied == pytest.approx(microbatches * (LAYERS_A_STAGE * layer + head), rel=1e-6)
    square = 2 * ROWS * HIDDEN // TENSOR * LENGTH * (LENGTH + 1)
    assert bound.classes["attention"].flops == microbatches * LAYERS_A_STAGE * (square + square * 5 // 2)
    assert held_together(bound) == pytest.approx(bound.step_seconds)
    assert 0 < bound.bubble < bound.step_seconds / 2
    assert bound.mfu == pytest.approx(1e12 / bound.step_seconds / machine.datasheet.peak_flops)
    # nothing that waits for another tick is copied
    assert not bound.copies


@pytest.mark.slow
def test_the_bound_counts_what_goes_together_once() -> None:
    """Of 8 microbatches on a stage some go alone: whichever, 4 layers have the attention of the formula in each."""
    rehearsal = experts_step()
    session, bound = rehearsal.session, step_bound(rehearsal, machine_named("h100"), 1e12)
    work = work_of(session.config, shapes_of(session.config, session.sizes, JAXTRON, rehearsal.gpu.device_kind))
    (layer,) = (stack.layer for stack in work.stacks)
    fused = [one for phase in (layer.forward, layer.backward) for one in phase.fused]
    attention = sum(one.flops for one in fused)
    assert attention > 0
    assert bound.classes["attention"].flops == pytest.approx(8 * 4 * attention, rel=1e-3)
    assert held_together(bound) == pytest.approx(bound.step_seconds)


def exchanges(module: hlo.Module, instructions: Sequence[hlo.Instruction]) -> Iterator[tuple[bool, dict[bool, int]]]:
    """Of each all-to-all of rows outside of further rounds, whether it is a backward's, and FLOPs of products scheduled
    between its start and its end, by whether they are."""
    shapes = {instruction.name: instruction.results for instruction in instructions}
    going: dict[str, tuple[bool, dict[bool, int]]] = {}
    for instruction in instructions:
        is_backward = "transpose(" in instruction.source or f"/{BACKWARD}/" in instruction.source
        if instruction.opcode == "all-to-all-start" and FURTHER_ROUNDS not in instruction.source:
            if max(array.bytes for array in instruction.results) >= 2**22:
                going[instruction.name] = is_backward, {False: 0, True: 0}
        elif instruction.opcode == "all-to-all-done":
            start = instruction.arguments.strip().rsplit("%", 1)[-1]
            if start in going:
                yield going.pop(start)
        else:
            for _, beside in going.values():
                beside[is_backward] += flops.most(module, instruction, shapes, {})

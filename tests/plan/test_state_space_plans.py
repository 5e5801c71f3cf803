"""Plans of state-space layers: memory near what was compiled, the time of a scan, and what travels."""

from pathlib import Path

import jax
import pytest

from jaxtron.config import load
from jaxtron.gpus import gpu_named
from jaxtron.models.work.profile import JAXTRON
from jaxtron.models.work.shapes import Shapes
from jaxtron.models.work.ssm import ScanShapes, scan
from jaxtron.plan.compiled.deviceless import Memory
from jaxtron.plan.compiled.memory import memory_use
from jaxtron.plan.compiled.rehearsal import rehearse
from jaxtron.plan.formula.activations import layer_bytes
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.machine import machine_named
from jaxtron.plan.memory_use import MemoryUse, StageActivations
from jaxtron.plan.plan import make_plan
from jaxtron.run.batches import abstract_batch
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from jaxtron.sharding.folding import FLAGS
from tests.support.scan_bounds import BOUNDS

CONFIGS = Path(__file__).parents[2] / "configs"
H100, GIB = gpu_named("h100"), 2**30
# layers as wide as those of the published 8B models (2406.07887)
WIDE = (
    "--model.hidden_size 4096 --model.num_layers 4 --model.vocab_size 1024 --data.sequence_length 4096 "
    "--train.precision bf16 "
)
MAMBA2 = "--model.mamba.state_size 128 --model.mamba.num_groups 8 --model.mamba.head_dim 64 "


def configuration(flags: str) -> Configuration:
    return load(Configuration, CONFIGS / "mamba_tiny.yaml", (WIDE + flags).split()).resolved()


# a row a device, and four
ALONE = "--mesh.data 8 --train.global_batch 256 --train.microbatches 32"
FOUR = "--mesh.data 2 --mesh.tensor 4 --train.global_batch 256 --train.microbatches 32"
ONE = "--mesh.data 2 --mesh.tensor 4 --train.global_batch 32 --train.microbatches 16"
HALVES = "--mesh.context 2 --mesh.tensor 4 --mesh.data 1 --data.sequence_length 16384 --train.global_batch 32 "
HALVES += "--train.microbatches 32"
MAMBA1, DELTA = "--model.pattern m --model.mamba.state_size 32 ", "--model.pattern G "
# GiB of temporaries and of what layers keep, of steps compiled with JAX 0.11.2 for 8 H100s (2026-11)
COMPILED = [
    (MAMBA2 + ALONE, 1.239, 1.191),
    (MAMBA2 + FOUR, 1.172, 1.191),
    (MAMBA1 + ALONE, 1.030, 1.197),
    (MAMBA1 + FOUR, 1.357, 1.227),
    (MAMBA1 + ONE, 0.648, 0.307),
    ("--model.pattern m --model.mamba.state_size 128 " + FOUR, 1.673, 1.438),
    (DELTA + ALONE, 1.042, 0.752),
    (DELTA + FOUR, 1.551, 0.752),
    (DELTA + ONE, 0.335, 0.188),
    # not used to find the multiples: half of 16,384 tokens
    (
        MAMBA2 + HALVES,
        0.636,
        0.596,
    ),
    (MAMBA1 + HALVES, 0.872, 0.613),
    (DELTA + HALVES, 0.560, 0.376),
]


@pytest.mark.parametrize(("flags", "temporaries", "kept"), COMPILED)
def test_memory_is_that_of_compiled_steps(flags: str, temporaries: float, kept: float) -> None:
    config = configuration(flags)
    sizes = {flag: getattr(config.mesh, flag) for flag in FLAGS}
    found = Estimator(config).memory(config, sizes, H100)
    assert found.temporaries / GIB == pytest.approx(temporaries, rel=0.15)
    assert found.activations / GIB == pytest.approx(kept, abs=0.001)


@pytest.mark.parametrize(("gpu", "groups", "forward", "both"), BOUNDS)
def test_a_scan_takes_the_time_of_its_compiled_kernels(gpu: str, groups: int, forward: float, both: float) -> None:
    """At 8 rows of 4,096 tokens, 80 heads of 64 and a state of 128, at the rate of products that bounds take."""
    machine = machine_named(gpu)
    rates = {"attention_fraction": machine.product_fraction, "kernel_seconds": 0.0}
    machine = machine.model_copy(update=rates)
    shapes = Shapes(JAXTRON, dict.fromkeys(FLAGS, 1), rows=8, length=4096, gathered=1, width=2)
    work = scan(shapes, ScanShapes(hidden=4096, heads=80, head_dim=64, groups=groups, state_size=128))
    each = [
        sum(map(machine.fused_seconds, phase.fused)) + machine.pass_seconds(phase.stream, 0)
        for phase in (work.forward, work.backward)
    ]
    assert 1e3 * each[0] == pytest.approx(forward, rel=0.05)
    assert 1e3 * sum(each) == pytest.approx(both, rel=0.05)


SMALL = (
    "--model.hidden_size 64 --model.vocab_size 128 --model.num_heads 4 --model.delta.linear_num_key_heads 2 "
    "--model.delta.linear_num_value_heads 4 --model.delta.linear_key_head_dim 16 "
    "--model.delta.linear_value_head_dim 16 --data.sequence_length 64 --train.global_batch 16 "
)
SHAPED = ("master_weights", "optimizer", "weights", "gradients", "activations", "messages")


def traced(flags: str) -> tuple[RunSession, MemoryUse, MemoryUse]:
    """A run on 8 devices, with its memory as traced and by formula."""
    config = load(Configuration, CONFIGS / "mamba_tiny.yaml", (SMALL + flags).split()).resolved()
    session = make_session(config, jax.devices()[:8])
    with session.use():
        batch = abstract_batch(session.config)
        nothing = Memory(arguments=0, outputs=0, aliases=0, temporaries=0)
        real = memory_use(session.trainer, batch, nothing, H100, 1)
    return session, real, Estimator(config).memory(config, session.sizes, H100)


def test_what_is_kept_is_that_of_the_real_step() -> None:
    """Pieces of a sequence are as long as the positions of which one state is kept."""
    flags = "--model.pattern Gm --model.num_layers 1 --mesh.data 2 --mesh.context 2 --mesh.tensor 2 "
    _, real, found = traced(flags + "--data.sequence_length 1024 --train.global_batch 4")
    assert {name: getattr(found, name) for name in SHAPED} == {name: getattr(real, name) for name in SHAPED}


def test_a_stage_holds_what_its_kinds_of_layers_leave() -> None:
    """Two stages of three layers each, of other kinds; the first has two microbatches in flight, the second one."""
    flags = "--mesh.pipe 2 --mesh.data 4 --train.microbatches 4 --model.pattern m--|G-* --model.num_layers 1"
    session, real, found = traced(flags)
    assert {name: getattr(found, name) for name in SHAPED} == {name: getattr(real, name) for name in SHAPED}
    (stack,) = session.trainer.stages.partitions
    each = dict(zip(stack.by_kind, layer_bytes(session.config, session.sizes), strict=True))
    for stage, held, own in ((0, 2, {"m": 1, "-": 2}), (1, 1, {"G": 1, "-": 1, "*": 1})):
        kinds = {kind: part.lengths[stage] for kind, part in stack.by_kind.items() if part.lengths[stage]}
        assert sorted(kinds.values()) == sorted(own.values())
        activations = held * sum(count * each[kind] for kind, count in kinds.items())
        assert real.stages[stage] == StageActivations(layers=3, held=held, bytes=activations)


# what half of all heads or channels have of a piece: a state and one decay for each of 64 heads; for each number of
# 4,096 channels' states two; a state and a matrix for each of 16 heads of G
TRAVELS = [
    (MAMBA2, 64 * (128 * 64 + 1)),
    ("--model.pattern m --model.mamba.state_size 32 ", 2 * 4096 * 32),
    ("--model.pattern G --model.delta.linear_value_head_dim 64 ", 16 * 128 * (64 + 128)),
]


@pytest.mark.parametrize(("layer", "numbers"), TRAVELS, ids="MmG")
def test_states_travel_between_parts_of_a_sequence(layer: str, numbers: int) -> None:
    flags = layer + "--mesh.context 4 --mesh.tensor 2 --mesh.data 1 --train.global_batch 12 --train.microbatches 4"
    config = configuration(flags)
    sizes = {flag: getattr(config.mesh, flag) for flag in FLAGS}
    work = work_of(config, shapes_of(config, sizes, JAXTRON, H100.device_kind)).stacks[0].layer
    for phase in (work.forward, work.backward):
        (moved,) = [one for one in phase.collectives if one.purpose == "context"]
        # 2 pieces a part and 3 rows, in float32
        assert moved.size == 2 * 4 * 3 * numbers * 4 and moved.kind == "all_gather"


@pytest.mark.slow
def test_the_published_hybrid_is_as_compiled_for_64_gpus() -> None:
    """What its layers keep, send and multiply is what the formula says, however they follow each other."""
    flags = "--mesh.data 16 --mesh.tensor 4 --train.microbatches 16"
    config = load(Configuration, CONFIGS / "mamba2_hybrid_8b.yaml", flags.split()).resolved()
    rehearsal = rehearse(config, gpu="h100", num_gpus=64)
    machine, sizes = machine_named("h100"), rehearsal.session.sizes
    compiled, found = rehearsal.memory_use, Estimator(config).memory(config, sizes, H100)
    assert {name: getattr(found, name) for name in SHAPED} == {name: getattr(compiled, name) for name in SHAPED}
    assert compiled.fits and found.total == pytest.approx(compiled.total, rel=0.05)
    plan = make_plan(rehearsal, machine, "hybrid")
    work = work_of(config, shapes_of(config, sizes, JAXTRON, H100.device_kind))
    layers = [
        (part.num_layers, phase)
        for (_, part), stack in zip(config.stage_plan(1).alike, work.stacks, strict=True)
        for phase in (stack.layer.forward, stack.layer.backward, stack.layer.weight)
    ]
    for kind in ("all_gather", "reduce_scatter"):
        sent = sum(row.payload for row in plan.communication if (row.key.kind, row.key.axes) == (kind, ("tensor",)))
        # all are along tensor; of the ends one more stream travels each way
        sizes_of = (count * one.size for count, phase in layers for one in phase.collectives if one.kind == kind)
        assert sent == pytest.approx(16 * sum(sizes_of), rel=0.02), kind
    ends = (1, work.head.forward), (1, work.head.backward), (1, work.head.weight)
    multiplied = sum(count * one.flops for count, phase in (*layers, *ends) for one in (*phase.products, *phase.fused))
    assert plan.compiled_flops == pytest.approx(16 * multiplied, rel=0.02)


@pytest.mark.slow
def test_the_published_hybrid_fits_8_to_1024_gpus() -> None:
    """With 4 tensor parts, batches of 1,024 sequences (2406.07887): the more replicas, the less state on each."""
    machine = machine_named("h100")
    config = load(Configuration, CONFIGS / "mamba2_hybrid_8b.yaml", [])
    estimator, totals, rates = Estimator(config.resolved()), [], []
    for replicas, microbatches in ((2, 128), (16, 16), (256, 1)):
        flags = f"--mesh.data {replicas} --mesh.tensor 4 --train.microbatches {microbatches}"
        found = load(Configuration, CONFIGS / "mamba2_hybrid_8b.yaml", flags.split()).resolved()
        sizes = {flag: getattr(found.mesh, flag) for flag in FLAGS}
        memory, step = estimator.memory(found, sizes, H100), predict(found, sizes, machine)
        assert memory.fits
        totals.append(memory.total)
        rates.append(step.mfu)
    assert totals[0] > totals[1] > totals[2] and rates[0] > rates[1] > rates[2]
    # weights and gradients travel once a step, beside ever less that they could hide behind
    assert 0.25 < rates[2] and rates[0] < 0.5

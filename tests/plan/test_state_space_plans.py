"""Plans of state-space layers: memory of Mamba-2 near what was compiled, the time of a scan, and what travels."""

from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.gpus import gpu_named
from jaxtron.models.work.profile import JAXTRON
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.machine import machine_named
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import FLAGS

CONFIGS = Path(__file__).parents[2] / "configs"
H100, GIB = gpu_named("h100"), 2**30
# layers as wide as those of the published 8B models (2406.07887)
WIDE = (
    "--model.hidden_size 4096 --model.mamba.state_size 128 --model.mamba.num_groups 8 --model.mamba.head_dim 64 "
    "--model.num_layers 4 --model.vocab_size 1024 --data.sequence_length 4096 --train.precision bf16 "
)


def configuration(flags: str) -> Configuration:
    return load(Configuration, CONFIGS / "mamba_tiny.yaml", (WIDE + flags).split()).resolved()


# GiB of temporaries and of what layers keep, of steps compiled with JAX 0.11.2 for 8 H100s (2026-11)
COMPILED = [
    ("--mesh.data 8 --train.global_batch 256 --train.microbatches 32", 1.239, 1.191),
    ("--mesh.data 2 --mesh.tensor 4 --train.global_batch 256 --train.microbatches 32", 1.172, 1.191),
    # not used to find the multiples: half of 16,384 tokens
    (
        "--mesh.context 2 --mesh.tensor 4 --mesh.data 1 --data.sequence_length 16384 --train.global_batch 32 "
        "--train.microbatches 32",
        0.636,
        0.596,
    ),
]


@pytest.mark.parametrize(("flags", "temporaries", "kept"), COMPILED)
def test_memory_is_that_of_compiled_steps(flags: str, temporaries: float, kept: float) -> None:
    config = configuration(flags)
    sizes = {flag: getattr(config.mesh, flag) for flag in FLAGS}
    found = Estimator(config).memory(config, sizes, H100)
    assert found.temporaries / GIB == pytest.approx(temporaries, rel=0.15)
    assert found.activations / GIB == pytest.approx(kept, abs=0.001)


def test_a_scan_takes_the_time_of_its_bytes_and_products() -> None:
    """At 8 rows of 4096 tokens, 80 heads of 64 and a state of 128: bounds of the kernels' own benchmark."""
    flags = (
        "--model.mamba.num_heads 80 --model.mamba.num_groups 1 --mesh.data 1 --train.global_batch 8 "
        "--train.microbatches 1"
    )
    config = configuration(flags)
    shapes = shapes_of(config, dict.fromkeys(FLAGS, 1), JAXTRON, H100.device_kind)
    layer, machine = work_of(config, shapes).stacks[0].layer, machine_named("h100")
    pairs, state, channels, tokens = 2 * 0.75 * 128, 128, 64, 8 * 4096 * 80
    forward = tokens * (pairs * (state + channels) + 4 * state * channels)
    backward = tokens * (pairs * (4 * state + 3 * channels) + 12 * state * channels)
    assert layer.forward.attention_flops == forward and layer.backward.attention_flops == backward
    # what it multiplies takes longer than what it reads and writes
    assert machine.attention_seconds(forward) > machine.pass_seconds(8 * 4096 * (3 * 80 * 64 + 2 * 128) * 2, 1)


def test_states_travel_between_parts_of_a_sequence() -> None:
    flags = "--mesh.context 4 --mesh.tensor 2 --mesh.data 1 --train.global_batch 4 --train.microbatches 4"
    config = configuration(flags)
    sizes = {flag: getattr(config.mesh, flag) for flag in FLAGS}
    layer = work_of(config, shapes_of(config, sizes, JAXTRON, H100.device_kind)).stacks[0].layer
    for phase in (layer.forward, layer.backward):
        (moved,) = [one for one in phase.collectives if one.purpose == "context"]
        # 2 pieces a part, of each a number and a state for each of 64 heads on a device
        assert moved.size == 2 * 4 * 64 * (128 * 64 + 1) * 4 and moved.kind == "all_gather"


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

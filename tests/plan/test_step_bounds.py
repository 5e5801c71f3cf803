"""Six compiled steps, kernel by kernel: what each class takes at least, from both sides.

A step that becomes slower is found here; one that becomes faster is written down. Milliseconds at the ceilings of
machines.yaml (docs/prediction.md): figures of compiled programs, not measurements. What a step is made of now stands
in the message of a test that fails.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.plan.compiled.bound import Bound, step_bound
from jaxtron.plan.compiled.rehearsal import Rehearsal, rehearse
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.machine import machine_named
from jaxtron.run.configuration import Configuration

CONFIGS = Path(__file__).parents[2] / "configs"
# of the step, of a class, and of the step what is too small to matter
STEP, CLASS, SMALL = 0.03, 0.1, 0.005


@dataclass(frozen=True)
class CompiledStep:
    """A recipe on so many GPUs: billions of parameters, tokens of a sequence, and what its step was made of."""

    recipe: str
    gpu: str
    num_gpus: int
    flags: str
    billions: float
    length: int
    milliseconds: float
    parts: dict[str, float]


LLAMA_8B = "--mesh.data 1 --train.global_batch 16 "
STEPS = {
    "gpt_1b": CompiledStep(
        "gpt_1b",
        "h200",
        1,
        "",
        1.31,
        2048,
        912.2,
        {
            "products": 666.6,
            "attention": 92.4,
            "elementwise": 92.8,
            "reductions": 47.0,
            "copies": 5.6,
            "buffers": 3.1,
            "fills": 4.7,
        },
    ),
    "llama_3_8b fsdp": CompiledStep(
        "llama_3_8b",
        "h100",
        8,
        LLAMA_8B + "--mesh.fsdp 8 --mesh.tensor 1 --train.microbatches 1",
        8.03,
        8192,
        1432.3,
        {
            "products": 994.6,
            "attention": 246.4,
            "elementwise": 91.5,
            "reductions": 46.9,
            "copies": 25.2,
            "buffers": 4.5,
            "fills": 5.8,
            "exposed": 17.5,
        },
    ),
    "llama_3_8b tensor": CompiledStep(
        "llama_3_8b",
        "h100",
        8,
        LLAMA_8B + "--mesh.fsdp 1 --mesh.tensor 8 --train.microbatches 8",
        8.03,
        8192,
        1914.0,
        {
            "products": 994.6,
            "attention": 246.4,
            "elementwise": 156.3,
            "reductions": 43.9,
            "copies": 13.6,
            "buffers": 0.8,
            "fills": 3.7,
            "exposed": 454.8,
        },
    ),
    "llama_3_70b": CompiledStep(
        "llama_3_70b",
        "h100",
        64,
        "--mesh.data 2 --mesh.fsdp 1 --mesh.pipe 4 --mesh.tensor 8 --train.global_batch 128 --train.microbatches 64 "
        "--model.recompute none",
        70.55,
        8192,
        13624.4,
        {
            "products": 9628.8,
            "attention": 1231.8,
            "elementwise": 579.2,
            "reductions": 178.1,
            "copies": 99.8,
            "buffers": 645.1,
            "fills": 24.4,
            "exposed": 904.0,
            "bubble": 333.3,
        },
    ),
    "gpt_1t": CompiledStep(
        "gpt_1t",
        "h100",
        512,
        "",
        1008.04,
        2048,
        24275.3,
        {
            "products": 18065.8,
            "attention": 330.1,
            "elementwise": 610.4,
            "reductions": 313.2,
            "copies": 44.5,
            "buffers": 871.2,
            "fills": 21.9,
            "exposed": 1548.6,
            "bubble": 2469.6,
        },
    ),
    "llama3_8b_128k": CompiledStep(
        "llama3_8b_128k",
        "h100",
        64,
        "",
        8.03,
        131072,
        5500.2,
        {
            "products": 994.6,
            "attention": 3941.2,
            "elementwise": 256.2,
            "reductions": 45.7,
            "copies": 111.0,
            "buffers": 4.5,
            "fills": 14.8,
            "exposed": 132.2,
        },
    ),
}


def rehearsed(case: CompiledStep) -> tuple[Rehearsal, Bound]:
    config = load(Configuration, CONFIGS / f"{case.recipe}.yaml", case.flags.split()).resolved()
    rehearsal, machine = rehearse(config, gpu=case.gpu, num_gpus=case.num_gpus), machine_named(case.gpu)
    prediction = predict(config, rehearsal.session.sizes, machine, gpus_per_node=rehearsal.gpus_per_node)
    return rehearsal, step_bound(rehearsal, machine, prediction.model_flops)


def parts(bound: Bound) -> dict[str, float]:
    """Milliseconds of the classes, of communication that is exposed, and of waiting."""
    found = {name: kernels.seconds for name, kernels in bound.classes.items()}
    found["exposed"] = sum(travel.exposed for travel in bound.communication.values())
    return {name: 1e3 * seconds for name, seconds in {**found, "bubble": bound.bubble}.items() if seconds > 1e-5}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_made_of_what_it_was_made_of(name: str) -> None:
    case = STEPS[name]
    rehearsal, bound = rehearsed(case)
    found = parts(bound)
    assert sum(found.values()) == pytest.approx(1e3 * bound.step_seconds, rel=1e-4)
    told = f"{name}: {1e3 * bound.step_seconds:.1f} ms, MFU at most {bound.mfu:.1%}, {found}"
    assert 1e3 * bound.step_seconds == pytest.approx(case.milliseconds, rel=STEP), told
    for part in {*found, *case.parts}:
        near = pytest.approx(case.parts.get(part, 0.0), rel=CLASS, abs=SMALL * case.milliseconds)
        assert found.get(part, 0.0) == near, f"{part} of {told}"
    assert rehearsal.memory_use.fits and rehearsal.memory.peak < 80e9
    session = rehearsal.session
    assert session.blueprint.num_parameters == pytest.approx(1e9 * case.billions, rel=0.01)
    assert session.config.data.sequence_length == case.length


@pytest.mark.slow
def test_a_guarded_step_reads_and_writes_no_weight_once_more() -> None:
    """`train.health`: what is kept of a bad step is chosen as the new state is written."""
    size = "--model.num_layers 4 --model.hidden_size 512 --model.num_heads 8 --model.vocab_size 1024 --mesh.data 8"
    guard = "--train.health.on_bad skip --train.health.gradient_spike 10"
    moved = []
    for flags in (size, f"{size} {guard}"):
        config = load(Configuration, CONFIGS / "gpt2_355m.yaml", f"{flags} --train.global_batch 64".split()).resolved()
        rehearsal, machine = rehearse(config, gpu="h100", num_gpus=8), machine_named("h100")
        bound = step_bound(rehearsal, machine, 1e12)
        moved.append(sum(kernels.read + kernels.written for kernels in bound.classes.values()))
        weights = 4 * rehearsal.session.blueprint.num_parameters
    # histories of norms, and scalars
    assert moved[1] - moved[0] < 0.01 * weights, (moved, weights)

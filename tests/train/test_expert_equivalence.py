"""Loss and every gradient of a mixture of experts do not depend on how experts and tokens lie on the devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.run.step import batch_sharding
from jaxtron.sharding.rules import use
from tests.support.equivalence import (
    MODELS,
    ONE_DEVICE,
    Result,
    assert_equal,
    by_name,
    changed,
    loss_and_gradients,
    make_batch,
    make_params,
    make_trainer,
    rules_for,
)

SLOW = pytest.mark.slow
MOE = {"num_experts": 8, "top_k": 2, "balance": 0.3, "z_loss": 0.05, "scores": "softmax"}
# what changes the numbers, by name; the others are about how tokens travel
ROUTING: dict[str, dict[str, Any]] = {
    "dropless": {},
    # all tokens to the first two experts, by `BIASES`
    "skewed": {"bias": True},
    "in groups, with biases": {"groups": 4, "top_groups": 1, "bias": True},
    "by probability": {"capacity_factor": 0.8},
    "by position": {"capacity_factor": 0.8, "drop": "position"},
    "at random": {"capacity_factor": 0.8, "drop": "random"},
    # the balance of a step cut in microbatches depends on the cut, which must be the same
    "over a microbatch": {"balance_over": "microbatch"},
    "over the step": {"balance_over": "global"},
    "shared": {"shared_size": 16, "shared_gate": True, "jitter": 0.3, "scores": "sigmoid", "renormalize": True},
}
# two experts are so much better than the others that these have no tokens
BIASES = {"skewed": {"logit_bias": np.where(np.arange(8) < 2, 0.0, -30.0)}}
GROUPED = {"buckets": "device", "implementation": "xla"}


class Case(NamedTuple):
    """How experts lie, and how a step runs."""

    mesh: dict[str, Any]
    routing: str = "dropless"
    zero: str = "optimizer"
    microbatches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: Any = "none"
    overlap: bool = False
    travel: Any = {}
    """Settings of how tokens get to experts."""

    def __str__(self) -> str:
        words = [f"{flag} {size}" for flag, size in self.mesh.items()] + [self.routing, self.zero]
        words += [self.schedule] if "pipe" in self.mesh else []
        words += [f"{name} {value}" for name, value in self.travel.items()]
        return "-".join(words)


# the two are on one device's width, which gets all tokens of its group in further rounds
QUICK = (Case({"data": 2, "tensor": 4, "expert": 4, "expert_tensor": 2}, "skewed", zero="parameters"),)
OTHERS = (
    Case({"data": 4, "tensor": 2, "expert": 8}, "skewed", microbatches=2, travel={"slots": 0.5}),
    Case({"data": 2, "context": 2, "tensor": 2, "expert": 4}, "skewed", travel=GROUPED),
    # experts lie along fsdp and tensor
    Case({"fsdp": 2, "context": 2, "tensor": 2, "expert": 4, "order": ("pipe", "data", "context", "fsdp", "tensor")}),
    Case({"data": 8}, "over a microbatch"),
    Case({"data": 8, "expert": 8}, zero="parameters"),
    Case({"tensor": 8, "expert": 8}, zero="none"),
    Case({"tensor": 8, "expert_tensor": 4}, "over a microbatch", microbatches=2),
    Case({"data": 2, "tensor": 4, "expert": 2}, zero="parameters", microbatches=2),
    Case({"data": 2, "tensor": 4, "expert": 8}, recompute="full"),
    Case({"data": 4, "tensor": 2, "expert": 4}, recompute=("moe",)),
    Case({"data": 4, "tensor": 2, "expert": 4, "expert_tensor": 2}),
    Case({"data": 8, "expert": 4, "expert_tensor": 2}, travel={"slots": 0.3}),
    Case({"fsdp": 8, "expert": 4}),
    Case({"data": 2, "fsdp": 2, "tensor": 2, "expert": 4}, zero="parameters"),
    Case({"fsdp": 2, "context": 2, "tensor": 2, "expert": 4}),
    Case({"context": 4, "data": 2, "expert": 8}),
    Case({"context": 4, "tensor": 2, "expert": 4}, "in groups, with biases", travel={"slots": 0.4}),
    Case({"pipe": 2, "data": 2, "tensor": 2, "expert": 4}, microbatches=4, schedule="gpipe"),
    Case({"pipe": 2, "data": 2, "tensor": 2, "expert_tensor": 2, "expert": 2}, microbatches=4, travel={"slots": 0.4}),
    Case({"pipe": 2, "data": 4, "expert": 2}, microbatches=4, schedule="zero_bubble", travel={"slots": 0.4}),
    Case(
        {"pipe": 2, "context": 2, "tensor": 2, "expert": 4},
        "over the step",
        microbatches=4,
        schedule="zero_bubble_v",
        chunks=2,
        recompute="full",
    ),
    Case(
        {"pipe": 2, "tensor": 2, "data": 2, "expert": 2},
        microbatches=4,
        schedule="eager_1f1b",
        overlap=True,
        zero="parameters",
    ),
    Case({"pipe": 2, "data": 4, "expert": 4}, microbatches=4, schedule="interleaved", chunks=2),
    Case({"pipe": 2, "fsdp": 2, "tensor": 2, "expert": 4}, microbatches=4, schedule="zero_bubble_v", chunks=2),
    Case(
        {"pipe": 2, "data": 2, "tensor": 2, "expert": 4},
        "skewed",
        microbatches=4,
        schedule="eager_interleaved",
        chunks=2,
        overlap=True,
    ),
    # a layer reads the load of earlier microbatches, and computes again, while another is on its way back
    Case(
        {"pipe": 2, "context": 2, "tensor": 2, "expert": 4},
        "over the step",
        microbatches=4,
        schedule="dualpipe_v",
        chunks=2,
        recompute="full",
        overlap=True,
    ),
    Case({"data": 4, "tensor": 2, "expert": 4}, "by probability"),
    Case({"pipe": 2, "data": 2, "tensor": 2, "expert": 4}, "by probability", microbatches=4),
    Case({"data": 2, "context": 2, "expert": 4}, "by position"),
    Case({"context": 2, "tensor": 2, "expert": 2}, "at random", microbatches=2),
    Case({"data": 2, "context": 2, "tensor": 2, "expert": 8}, "shared"),
    Case({"data": 8, "expert": 2}, travel={**GROUPED, "implementation": "reference"}),
    Case({"tensor": 2, "data": 4}, travel=GROUPED),
    Case(
        {"data": 2, "tensor": 4, "expert": 2, "expert_tensor": 2},
        "in groups, with biases",
        travel={**GROUPED, "slots": 0.3},
    ),
    Case(
        {"pipe": 2, "data": 2, "tensor": 2, "expert": 4},
        "skewed",
        microbatches=4,
        schedule="zero_bubble",
        travel={**GROUPED, "slots": 0.4},
    ),
    Case({"data": 4, "tensor": 2, "expert": 8}, microbatches=2, travel={"exchange": "all_gather"}),
    Case(
        {"data": 2, "context": 2, "expert": 2, "expert_tensor": 2},
        "skewed",
        travel={"exchange": "all_gather"},
    ),
    Case({"data": 4, "tensor": 2, "expert": 4}, travel={**GROUPED, "exchange": "all_gather", "slots": 0.5}),
    Case({"data": 4, "tensor": 2, "expert": 4}, "by probability", travel={"exchange": "capacity"}),
    Case({"context": 2, "tensor": 2, "expert": 2}, "by position", travel={**GROUPED, "exchange": "capacity"}),
)


def model(routing: str, travel: dict[str, Any], recompute: Any) -> ModelConfig:
    moe = {**MOE, **ROUTING[routing], **travel}
    return changed(MODELS["llama"], pattern="*E", num_layers=4, recompute=recompute, moe=moe)


@functools.cache
def one_device(routing: str, microbatches: int) -> Result:
    """In one round that takes all."""
    settings = model(routing, {"slots": 8.0}, "none")
    found = loss_and_gradients(settings, ONE_DEVICE, "none", microbatches, biases=BIASES.get(routing, {}))
    # an expert has a gradient where it has tokens
    busy = [value.any(tuple(range(2, value.ndim))) for name, value in found.gradients.items() if "moe']['up']" in name]
    assert busy and all((one.sum(-1) == (2 if routing == "skewed" else 8)).all() for one in busy)
    return found


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=SLOW) for case in OTHERS)], ids=str)
def test_loss_and_every_gradient_equal_one_device(case: Case) -> None:
    pipeline = PipelineConfig()
    if "pipe" in case.mesh:
        pipeline = PipelineConfig(schedule=case.schedule, chunks=case.chunks, overlap=case.overlap)
    settings = model(case.routing, case.travel, case.recompute)
    found = loss_and_gradients(
        settings, case.mesh, case.zero, case.microbatches, pipeline, biases=BIASES.get(case.routing, {})
    )
    expected = one_device(case.routing, case.microbatches if "balance_over" in ROUTING[case.routing] else 1)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_equal(found.gradients, expected.gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "scales", "tolerance"),
    [
        ("fp32", (1.0, 1024.0), 0.0),
        # the smallest of gradients have fewer bits under the smaller scale
        ("fp16", (1024.0, 4096.0), 2e-3),
    ],
)
def test_losses_that_keep_load_even_carry_the_scale_of_the_loss(
    precision: str, scales: tuple[float, float], tolerance: float
) -> None:
    """Both losses are large here: a part of a gradient without the scale, or with it twice, would be seen."""
    with use(rules_for({"data": 4, "tensor": 2, "expert": 4})):
        trainer = make_trainer(model("dropless", {}, "none"), microbatches=2, precision=precision)
        params, batch = make_params(trainer), jax.device_put(make_batch(), batch_sharding())
        run = jax.jit(trainer.loss_and_gradients)
        found = [by_name(run(params, batch, jnp.int32(5), jnp.float32(scale))[1], trainer) for scale in scales]
    for name, expected in found[1].items():
        assert np.abs(found[0][name] - expected).max() <= tolerance * np.abs(expected).max(), name

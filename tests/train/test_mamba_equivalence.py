"""Loss and every gradient of state-space layers do not depend on how sequence, heads and groups lie on the devices."""

import functools
from typing import Any, NamedTuple

import pytest

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.sharding.config import ContextConfig
from tests.support.equivalence import MODELS, ONE_DEVICE, Result, assert_equal, changed, loss_and_gradients

SLOW = pytest.mark.slow


class Case(NamedTuple):
    """How a step runs."""

    mesh: dict[str, int]
    groups: int = 2
    packed: bool = True
    zero: str = "optimizer"
    microbatches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    context: Any = {}
    recompute: Any = "none"
    width: int = 3
    """Of the convolution, which sees no further than a piece before its own."""

    def __str__(self) -> str:
        words = [f"{flag} {size}" for flag, size in self.mesh.items()]
        words += [self.schedule] if "pipe" in self.mesh else []
        return "-".join([*words, f"groups {self.groups}", "packed" if self.packed else "whole"])


QUICK = (Case({"data": 2, "context": 2, "tensor": 2}),)
# of whole sequences the conformance suite has these kinds on every schedule
OTHERS = (
    Case({"context": 2}, packed=False),
    Case({"context": 4}, recompute=("mamba", "delta")),
    Case({"context": 8}, recompute="full", width=2),
    Case({"context": 4}, context={"method": "hierarchical", "inner": 2}),
    Case({"context": 2, "fsdp": 2}, context={"method": "all_gather"}, microbatches=2),
    Case({"tensor": 2}, packed=False),
    # groups that are on every device, or on some
    Case({"tensor": 4}),
    Case({"tensor": 8}, groups=1),
    Case({"tensor": 8}, groups=8, zero="parameters"),
    Case({"fsdp": 2, "context": 2, "tensor": 2}, groups=1, zero="parameters"),
    Case({"pipe": 2, "tensor": 2, "context": 2}, microbatches=4),
    Case({"pipe": 4, "data": 2}, microbatches=4, schedule="gpipe"),
    Case({"pipe": 2, "context": 2, "tensor": 2}, microbatches=4, schedule="zero_bubble_v", chunks=2),
)


def model(groups: int, width: int, recompute: Any) -> ModelConfig:
    """With a norm in which rounding is not scaled up."""
    mamba = {"num_heads": 8, "head_dim": 8, "state_size": 8, "num_groups": groups, "conv_width": width}
    keys = {"linear_num_key_heads": groups, "linear_key_head_dim": 6, "linear_conv_kernel_dim": width}
    delta = {**keys, "linear_num_value_heads": 8, "linear_value_head_dim": 4}
    changes: dict[str, Any] = {"pattern": "MGm(*-)", "num_layers": 4, "norm_epsilon": 0.1, "recompute": recompute}
    return changed(MODELS["llama"], **changes, mamba=mamba, delta=delta)


@functools.cache
def one_device(groups: int, width: int, packed: bool) -> Result:
    return loss_and_gradients(model(groups, width, "none"), ONE_DEVICE, "none", 1, packed=packed)


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=SLOW) for case in OTHERS)], ids=str)
def test_loss_and_every_gradient_equal_one_device(case: Case) -> None:
    pipeline = PipelineConfig()
    if "pipe" in case.mesh:
        pipeline = PipelineConfig(schedule=case.schedule, chunks=case.chunks)
    found = loss_and_gradients(
        model(case.groups, case.width, case.recompute),
        case.mesh,
        case.zero,
        case.microbatches,
        pipeline,
        context=ContextConfig(**case.context),
        packed=case.packed,
    )
    expected = one_device(case.groups, case.width, case.packed)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_equal(found.gradients, expected.gradients)


@pytest.mark.slow
def test_long_documents_equal_one_device() -> None:
    """Pieces of 300 positions are several chunks of every kind; documents, and what is left of states after a hundred
    positions (biases of steps are low), go on over chunks and pieces."""
    # without attention no other setting of a llama has an effect
    names = {"hidden_size", "vocab_size", "vocab_multiple", "norm", "norm_epsilon", "tied_head", "mamba", "delta"}
    kept = model(2, 4, "none").model_dump(include=names, exclude_unset=True)
    config = ModelConfig(**kept, pattern="MGm", num_layers=1, position="none")
    lengths = {"length": 1200, "mean": 250, "biases": {"dt_bias": -5.0}}
    step = functools.partial(loss_and_gradients, config, zero="none", microbatches=1, rows=8, packed=True, **lengths)
    expected, found = step(mesh=ONE_DEVICE), step(mesh={"context": 2, "tensor": 2})
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_equal(found.gradients, expected.gradients)


@pytest.mark.slow
def test_documents_do_not_see_each_other() -> None:
    assert one_device(2, 3, True).loss != pytest.approx(one_device(2, 3, False).loss, rel=1e-4)

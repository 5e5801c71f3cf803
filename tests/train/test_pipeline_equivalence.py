"""The central promise, for pipelines: loss, every gradient and every update are those of one device.

Deeper pipelines, layers shared out unevenly, few microbatches, every model: those of two stages, where every kind of
schedule meets every way to shard, are in `tests/conformance`. The fast cases have one of each kind; the slow go on.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work
from jaxtron.pipeline.schedules.table_file import write_csv
from tests.support.equivalence import (
    MODELS,
    ONE_DEVICE,
    SCANNED,
    TOLERANCE,
    Steps,
    assert_equal,
    assert_steps_equal,
    changed,
    evaluate,
    loss_and_gradients,
    one_device,
    take_steps,
)

# divided by 3 too: numbers of microbatches that are no multiple of the stages
ROWS = 24


class Case(NamedTuple):
    """One pipeline; microbatches of different counts of tokens, the last without any."""

    model: str
    schedule: str
    mesh: dict[str, int]
    microbatches: int
    chunks: int = 1
    num_layers: int = 8
    zero: str = "optimizer"
    stage_layers: tuple[int, ...] | None = None
    changes: dict = SCANNED

    def __str__(self) -> str:
        shown = [self.model, self.schedule, *(f"{axis} {size}" for axis, size in self.mesh.items())]
        shown += [f"microbatches {self.microbatches}", f"chunks {self.chunks}", f"zero {self.zero}"]
        shown += [] if self.stage_layers is None else [f"layers {self.stage_layers}"]
        return "-".join([*shown, *(f"{name} {value}" for name, value in self.changes.items())])

    @property
    def pipeline(self) -> PipelineConfig:
        return PipelineConfig(schedule=self.schedule, chunks=self.chunks, stage_layers=self.stage_layers)


FULL, SELECTIVE = ({"recompute": level, **SCANNED} for level in ("full", "selective"))
QUICK_CASES = [
    # with dropout in the table of one's own
    Case("gpt", "1f1b", {"pipe": 2, "tensor": 2, "data": 2}, 3),
    Case("gpt", "interleaved", {"pipe": 2, "fsdp": 2, "tensor": 2}, 6, chunks=3, stage_layers=(1, 2, 1, 2, 1, 1)),
    Case("llama", "dualpipe_v", {"pipe": 4, "fsdp": 2}, 12, chunks=2, zero="parameters", changes=FULL),
]
SLOW_CASES = [
    Case("gpt with dropout", "1f1b", {"pipe": 2, "tensor": 2, "data": 2}, 3),
    Case("llama", "eager_1f1b", {"pipe": 4, "tensor": 2}, 6, changes=SELECTIVE),
    Case("llama", "zero_bubble_v", {"pipe": 4, "data": 2}, 6, chunks=2, zero="none"),
    Case("llama", "gpipe", {"pipe": 2, "fsdp": 2, "data": 2}, 3, changes=FULL),
    Case("gpt", "1f1b", {"pipe": 8}, 12),
    Case("llama", "1f1b", {"pipe": 4, "fsdp": 2}, 4, zero="parameters", stage_layers=(1, 3, 3, 1)),
    Case("gpt with dropout", "eager_1f1b", {"pipe": 8}, 3, changes=FULL),
    Case("llama", "interleaved", {"pipe": 4, "data": 2}, 4, chunks=2, zero="parameters", changes=FULL),
    Case("gpt with dropout", "eager_interleaved", {"pipe": 4, "tensor": 2}, 6, chunks=2, zero="none"),
    Case("gpt", "eager_interleaved", {"pipe": 2, "fsdp": 2, "data": 2}, 3, chunks=3, changes=SELECTIVE),
    Case("gpt with dropout", "zero_bubble", {"pipe": 4, "tensor": 2}, 6, changes=SELECTIVE),
    # more stages and chunks
    Case("gpt", "gpipe", {"pipe": 8}, 6, changes=SELECTIVE),
    Case("gpt with dropout", "interleaved", {"pipe": 4, "tensor": 2}, 12, chunks=3, num_layers=12, changes=SELECTIVE),
    Case("gpt", "eager_interleaved", {"pipe": 8}, 12, chunks=2, num_layers=16, changes=FULL),
    Case("gpt", "dualpipe_v", {"pipe": 4, "data": 2}, 12, chunks=2, zero="none", changes=SELECTIVE),
    Case("llama", "zero_bubble", {"pipe": 4, "data": 2}, 3, zero="parameters", changes=FULL),
    # two layers in an iteration of their loop
    Case("gpt", "eager_interleaved", {"pipe": 2, "tensor": 2}, 4, chunks=2, changes={"unroll": 2}),
    # parallel branches, multi-query, ALiBi, a norm after the embedding
    Case("palm", "1f1b", {"pipe": 4, "tensor": 2}, 8),
    Case("palm", "eager_interleaved", {"pipe": 2, "fsdp": 2, "tensor": 2}, 6, chunks=2, changes=SELECTIVE),
    Case("palm", "zero_bubble_v", {"pipe": 2, "data": 2, "tensor": 2}, 6, chunks=2, zero="parameters"),
    Case("palm", "dualpipe_v", {"pipe": 2, "fsdp": 4}, 6, chunks=2, changes=FULL),
    Case("palm", "gpipe", {"pipe": 2, "tensor": 4}, 2, changes={"recompute": ["mlp", "attention_core"], **SCANNED}),
    # a stage with next to nothing but the embedding, and one with next to nothing but the loss
    Case("gpt", "1f1b", {"pipe": 4, "data": 2}, 4, stage_layers=(0, 4, 4, 0)),
    Case("llama", "zero_bubble_v", {"pipe": 2, "tensor": 2}, 4, chunks=2, stage_layers=(0, 4, 3, 1)),
    # one microbatch
    Case("gpt", "1f1b", {"pipe": 2, "tensor": 2}, 1),
    Case("llama", "zero_bubble", {"pipe": 2, "data": 2}, 1),
    Case("gpt", "eager_1f1b", {"pipe": 4, "tensor": 2}, 1),
]


def assert_as_one_device(case: Case) -> None:
    model = changed(MODELS[case.model], num_layers=case.num_layers, **case.changes)
    result = loss_and_gradients(model, case.mesh, case.zero, case.microbatches, case.pipeline, ROWS)
    expected = one_device(case.model, case.num_layers, ROWS)
    assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert_equal(result.gradients, expected.gradients)


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_loss_and_every_gradient_equal_one_device(case: Case):
    assert_as_one_device(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_loss_and_every_gradient_equal_one_device_in_more_cases(case: Case):
    assert_as_one_device(case)


@pytest.mark.slow
def test_a_table_of_ones_own(tmp_path: Path):
    # no generator makes this: microbatches out of order, pairs of different ones, a tick in which all are idle
    def entry(forward=None, backward=None) -> Entry:
        return Entry(*(None if index is None else Work(0, index) for index in (forward, backward)))

    table = (
        (entry(2), entry()),
        (entry(0), entry(2)),
        (entry(), entry()),
        (entry(1), entry(0, 2)),
        (entry(None, 2), entry(1)),
        (entry(), entry(None, 1)),
        (entry(None, 1), entry(None, 0)),
        (entry(None, 0), entry()),
    )
    write_csv(Schedule("mine", table, 3), tmp_path / "mine.csv")
    assert_as_one_device(Case("gpt with dropout", str(tmp_path / "mine.csv"), {"pipe": 2, "tensor": 2}, 3))


EVALUATED = [
    Case("gpt with dropout", "1f1b", {"pipe": 4, "tensor": 2}, 8, stage_layers=(1, 3, 2, 2)),
    Case("llama", "interleaved", {"pipe": 2, "fsdp": 2, "data": 2}, 2, chunks=3),
    pytest.param(Case("llama", "zero_bubble_v", {"pipe": 4, "tensor": 2}, 4, chunks=2), marks=pytest.mark.slow),
]


@functools.cache
def loss_without_dropout(name: str, num_layers: int) -> float:
    plain = changed(MODELS[name], num_layers=num_layers, **SCANNED)
    return evaluate(plain, ONE_DEVICE, rows=ROWS)


@pytest.mark.parametrize("case", EVALUATED, ids=str)
def test_evaluation_equals_one_device(case: Case):
    model = changed(MODELS[case.model], num_layers=case.num_layers, **case.changes)
    nll = evaluate(model, case.mesh, case.pipeline, ROWS, case.microbatches)
    assert nll == pytest.approx(loss_without_dropout(case.model, case.num_layers), rel=TOLERANCE)


@functools.cache
def one_device_steps(name: str, num_layers: int) -> Steps:
    model = changed(MODELS[name], num_layers=num_layers, **SCANNED)
    return take_steps(model, ONE_DEVICE, "none", (0, 0), global_batch=ROWS)


def assert_steps_as_one_device(case: Case) -> None:
    model = changed(MODELS[case.model], num_layers=case.num_layers, **case.changes)
    train = {"global_batch": ROWS, "microbatches": case.microbatches}
    result = take_steps(model, case.mesh, case.zero, (0, 0), case.pipeline, **train)
    assert_steps_equal(result, one_device_steps(case.model, case.num_layers))


@pytest.mark.slow
def test_whole_steps_equal_one_device():
    # uneven: rows of zeros stay zeros, and count neither in the norm nor in weight decay
    assert_steps_as_one_device(
        Case("gpt", "eager_1f1b", {"pipe": 4, "data": 2}, 6, num_layers=5, stage_layers=(1, 2, 1, 1))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("llama", "interleaved", {"pipe": 2, "fsdp": 2, "tensor": 2}, 6, chunks=2, num_layers=5, zero="parameters"),
        Case("gpt", "zero_bubble_v", {"pipe": 2, "tensor": 2, "data": 2}, 6, chunks=2, num_layers=5, zero="none"),
    ],
    ids=str,
)
def test_whole_steps_equal_one_device_in_more_cases(case: Case):
    assert_steps_as_one_device(case)


def test_two_layers_that_changed_places_are_noticed():
    expected = one_device("gpt", 8, ROWS).gradients
    for name in (name for name in expected if "stack" in name and "kernel" in name):
        wrong = expected[name].copy()
        wrong[[3, 4]] = wrong[[4, 3]]
        with pytest.raises(AssertionError):
            assert_equal({**expected, name: wrong}, expected)

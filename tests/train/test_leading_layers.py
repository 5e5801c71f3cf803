"""Layers with an MLP that lead those with experts: one step on any mesh, and where a pipeline has them."""

import dataclasses

import pytest

from jaxtron.config import UserError, load
from jaxtron.gpus import gpu_named
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.cost import hardware_flops_per_token, model_flops_per_token
from jaxtron.models.decoder.kinds import LATENT, MLP
from jaxtron.models.work.profile import PROFILES
from jaxtron.plan.formula.workload import shapes_of
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import FLAGS
from tests.conformance.communication import Communication
from tests.conformance.runs import assert_same, reference, step
from tests.conformance.subjects import DECODER, LENGTH, ONE_DEVICE, SETTINGS, Layout, make_subject

EXPERTS = SETTINGS["E"] | {"moe": SETTINGS["E"]["moe"] | {"leading_dense": 2, "bias_rate": 0.01}}
MODEL = {**DECODER, **SETTINGS["L"], **EXPERTS, "pattern": "LE", "num_layers": 6, "position": "rotary", "dropout": 0.1}
SUBJECT = dataclasses.replace(make_subject("decoder", MODEL), name="dense first")
# one layer of each kind
SHALLOW = {**MODEL, "num_layers": 2, "moe": EXPERTS["moe"] | {"leading_dense": 1}}
LAYOUTS = (
    Layout({"data": 2, "fsdp": 2, "tensor": 2, "expert": 4}),
    Layout({"fsdp": 2, "context": 2, "tensor": 2}, zero="none"),
    Layout({"pipe": 2, "data": 2, "tensor": 2}, schedule="interleaved", parts=2, microbatches=4),
    Layout({"pipe": 2, "fsdp": 2, "expert": 2}, schedule="zero_bubble", microbatches=4, zero="none"),
    Layout({"pipe": 2, "data": 2, "context": 2}, schedule="dualpipe_v", parts=2, microbatches=4, zero="parameters"),
)


def test_a_step_is_plain_differentiation() -> None:
    shallow = dataclasses.replace(SUBJECT, settings=SHALLOW)
    assert_same(step(shallow, Layout({"fsdp": 2, "tensor": 2})), reference(shallow))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_is_plain_differentiation_on_every_mesh(layout: Layout):
    found = step(SUBJECT, layout)
    assert_same(found, reference(SUBJECT))
    if "expert" not in layout.mesh:
        Communication(found, layout.mesh).check()


@pytest.mark.slow
def test_what_is_recomputed_changes_no_number():
    assert_same(step(SUBJECT, Layout({"fsdp": 2, "tensor": 2}), recompute="full"), reference(SUBJECT))


def model(**changes) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL, **changes})


def test_they_are_the_pattern_with_an_mlp_for_experts():
    layout = model().layout
    assert layout.layers == (("L",), ("-",)) * 2 + (("L",), ("E",)) * 4 and layout.repeats == 4
    # of a period with several mixtures all at once, whatever else it has
    longer = model(pattern="*-LEWE", attention={"window": 3}, num_layers=3).layout
    assert ["".join(branch) for branch in longer.layers[:6]] == list("*-L-W-") and len(longer.leading) == 1
    grouped = model(pattern="(LE)")
    assert grouped.layout.layers[:3] == (("L", "-"), ("L", "-"), ("L", "E")) and MLP in grouped.kinds


def test_operations_count_them_as_what_they_are_and_once_more():
    config = model()
    dense = sum(LATENT.flops(config, LENGTH).values()) + sum(MLP.flops(config, LENGTH).values())
    one_less = model(num_layers=5, moe=EXPERTS["moe"] | {"leading_dense": 1})
    assert model_flops_per_token(config, LENGTH) - model_flops_per_token(one_less, LENGTH) == 3 * dense
    assert hardware_flops_per_token(config, LENGTH) - model_flops_per_token(config, LENGTH) == 2 * dense
    # of a plan they are part of what enters the stack, with another forward in its backward
    whole = SUBJECT.configuration(ONE_DEVICE)
    shapes = shapes_of(whole, dict.fromkeys(FLAGS, 1), PROFILES["jaxtron"], gpu_named("h100").device_kind)
    enter = whole.family.work(whole.model, shapes).stacks[0].enter
    assert enter.forward.flops == pytest.approx(shapes.tokens * 2 * dense)
    assert (enter.backward + enter.weight).flops == pytest.approx(3 * enter.forward.flops)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.num_layers 2", "model.moe.leading_dense 2 is more than 1: a period of model.pattern must be left"),
        ("--model.pattern LELE- --model.moe.leading_dense 3", "3 is not a multiple of 2, the layers with experts in a"),
        ("--model.pattern (L-E)", "where model.pattern has one in the same group"),
        ("--model.pattern L-", "model.moe.leading_dense 2 has no effect with model.pattern L-"),
        (
            "--mesh.pipe 4 --pipeline.stage_layers [1,1,2,2]",
            "add up to the model's 6 layers, at least 2 of them on the",
        ),
        (
            "--mesh.pipe 4 --pipeline.stage_layers [2,1,1,1]",
            "add up to the model's 6 layers, at least 2 of them on the",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(flags, message):
    base = "--model.pattern LE --model.num_layers 6 --model.bias false --model.moe.leading_dense 2"
    with pytest.raises(UserError, match=message) as error:
        config = load(Configuration, None, f"{base} {flags}".split())
        config.stage_plan(4, 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stages", "flags", "lengths"),
    [
        # they count among the layers of the first stage
        (2, "", (1, 3)),
        (2, "--pipeline.stage_layers [4,2]", (2, 2)),
        (4, "--pipeline.stage_layers [2,1,1,2]", (0, 1, 1, 2)),
        (4, "", (0, 2, 1, 1)),
    ],
)
def test_a_pipeline_has_them_on_its_first_stage(stages, flags, lengths):
    config = SUBJECT.configuration(ONE_DEVICE)
    changed = load(Configuration, None, f"--mesh.pipe {stages} {flags}".split()).pipeline
    (partition,) = config.model_copy(update={"pipeline": changed}).stage_plan(stages, 8).partitions
    assert partition.lengths == lengths


def test_cuts_of_the_pattern_count_them():
    cut = {"pattern": "LELELE|LELELE", "num_layers": 1}
    config = dataclasses.replace(SUBJECT, settings={**MODEL, **cut}).configuration(ONE_DEVICE)
    (partition,) = config.stage_plan(2, 2).partitions
    assert partition.lengths == (1, 3) and config.model.layout.repeats == 4

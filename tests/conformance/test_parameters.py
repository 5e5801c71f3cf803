"""Of every family and kind of layer: parameters say what they are, and are as many as formulas count, on every mesh."""

import functools
import math

import jax
import numpy as np
import pytest

from jaxtron.gpus import gpu_named
from jaxtron.models.decoder.cost import norm_parameters
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.models.decoder.work import LAYER_WORK
from jaxtron.models.work.profile import PROFILES
from jaxtron.plan.formula.workload import shapes_of
from jaxtron.run.session import make_trainer
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.layout import spec_axes
from jaxtron.sharding.parameters import ParameterSpec
from jaxtron.sharding.rules import use
from tests.conformance.subjects import FAMILY_SUBJECTS, KIND_SUBJECTS, LENGTH, ONE_DEVICE, SUBJECTS, Layout, Subject
from tests.support.equivalence import by_name, rules_for

CUBE = Layout({"data": 2, "fsdp": 2, "tensor": 2}, zero="parameters")
# slots of stages in another order than the layers
STAGES = Layout({"pipe": 2, "data": 2, "tensor": 2}, schedule="zero_bubble_v", parts=2, microbatches=4)
each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
each_kind = pytest.mark.parametrize("subject", KIND_SUBJECTS, ids=str)


@functools.cache
def specs(subject: Subject, layout: Layout) -> dict[str, ParameterSpec]:
    """What every parameter is, by name."""
    with use(rules_for(dict(layout.mesh), layout.zero)):
        found = jax.tree.leaves_with_path(make_trainer(subject.configuration(layout)).blueprint.parameters)
        return {jax.tree_util.keystr(path): spec for path, spec in found}


@each_subject
def test_every_parameter_says_what_it_is(subject: Subject):
    for spec in specs(subject, ONE_DEVICE).values():
        assert spec.dtype == np.float32 and len(spec.axes) == len(spec.shape) and spec.role
        assert spec.is_stacked == (spec.axes[0] == "layers") and "layers" not in spec.axes[1:]
    assert any(spec.is_stacked for spec in specs(subject, ONE_DEVICE).values())


@each_subject
@pytest.mark.parametrize("layout", [CUBE, STAGES], ids=str)
def test_only_the_layout_depends_on_the_mesh(subject: Subject, layout: Layout):
    alone, found = specs(subject, ONE_DEVICE), specs(subject, layout)
    assert found.keys() == alone.keys()
    for name, spec in found.items():
        one = alone[name]
        assert (spec.dtype, spec.axes, spec.role, spec.shape) == (one.dtype, one.axes, one.role, one.shape)
        own, sizes = spec.layout, {"pipe": 1, **layout.mesh}
        for padded, size, axes in zip(own.padded, own.shape, spec_axes(own.spec), strict=True):
            parts = math.prod(sizes.get(axis, 1) for axis in axes)
            assert padded % parts == 0 and size <= padded < size + parts
        # at rest it is split as where it is used, and by what it is gathered over on the way
        at_rest, used, gathered = (
            {(dim, axis) for dim, axes in places for axis in axes if sizes.get(axis, 1) > 1}
            for places in (
                enumerate(spec_axes(own.spec)),
                enumerate(spec_axes(own.used)),
                ((gather.dim, gather.axes) for gather in (*own.once, *own.at_use)),
            )
        )
        assert at_rest == used | gathered and not used & gathered
    assert any(spec.layout.at_use or spec.layout.once for spec in found.values())


@each_subject
def test_parameters_are_as_many_as_the_formula_says(subject: Subject):
    config = subject.configuration(ONE_DEVICE)
    counted = sum(spec.size for spec in specs(subject, ONE_DEVICE).values() if spec.status != "buffer")
    assert config.family.num_parameters(config.model, LENGTH) == counted
    assert config.family.flops_per_token(config.model, LENGTH) > 0


@each_kind
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_kinds_parameters_on_a_device_are_its_own_formula(subject: Subject, tensor: int):
    kind, config = KINDS[subject.kind], subject.configuration(ONE_DEVICE).model
    found = specs(subject, Layout({"tensor": tensor}))
    own = {name: spec for name, spec in found.items() if f"['{kind.module}']" in name}
    assert all(spec.is_stacked for spec in own.values())
    local = sum(local_size(spec, tensor) for spec in own.values())
    assert local == config.layout.repeats * kind.parameters(config, tensor)
    # what else a layer has is its norm
    layers = sum(spec.size for spec in found.values() if spec.is_stacked)
    norms = config.layout.repeats * norm_parameters(config, config.hidden_size)
    assert layers - sum(spec.size for spec in own.values()) == norms


def local_size(spec: ParameterSpec, tensor: int) -> int:
    """Of the part that one of so many devices has where it is used."""
    split = [tensor if "tensor" in axes else 1 for axes in spec_axes(spec.layout.used)]
    return math.prod(size // parts for size, parts in zip(spec.shape, split, strict=True))


@each_kind
def test_a_kinds_work_is_its_flops_region_by_region(subject: Subject):
    """What a forward's slots of the plan run is what the papers' formulas count."""
    kind, config = KINDS[subject.kind], subject.configuration(ONE_DEVICE)
    for profile in PROFILES.values():
        shapes = shapes_of(config, dict.fromkeys(FLAGS, 1), profile, gpu_named("h100").device_kind)
        work = LAYER_WORK[kind.symbol].slots(config.model, shapes)
        counted = kind.flops(config.model, shapes.length)
        assert set(work) == set(counted) == set(kind.regions) and all(flops > 0 for flops in counted.values())
        for region, flops in counted.items():
            # scores in memory are computed for the whole square, also where a window masks most
            is_whole = kind.attends == "window" and region in kind.parts and shapes.profile.attention != "fused"
            found, wanted = work[region].forward.flops, shapes.tokens * flops
            if kind.expert_parameters and profile.expert_rows == "round":
                # rows of a round that no token fills are multiplied too
                assert wanted < found < config.model.moe.slots * wanted
            else:
                assert found > wanted if is_whole else found == pytest.approx(wanted)


@each_subject
def test_a_models_work_is_its_layers_and_its_head(subject: Subject):
    """What a plan computes with, products of forwards, adds up to the family's own FLOPs."""
    config = subject.configuration(ONE_DEVICE)
    fused = [profile for profile in PROFILES.values() if profile.attention == "fused"]
    assert fused
    for profile in fused:
        shapes = shapes_of(config, dict.fromkeys(FLAGS, 1), profile, gpu_named("h100").device_kind)
        work = config.family.work(config.model, shapes)
        layers = config.family.stacks(config.model).values()
        forward = sum(count * stack.layer.forward.flops for count, stack in zip(layers, work.stacks, strict=True))
        # the head's gradients are formed in its forward
        found = 3 * forward + work.head.forward.flops
        wanted = shapes.tokens * config.family.flops_per_token(config.model, LENGTH)
        # products where a stack is entered are run again in the backward, which no model's FLOPs count
        entering = [getattr(stack.enter, slot) for stack in work.stacks for slot in ("forward", "backward", "weight")]
        entered = sum(phase.flops for phase in entering)
        assert found < wanted < found + entered if entered else found == pytest.approx(wanted)
        assert all(stack.layer.backward.flops >= stack.layer.forward.flops for stack in work.stacks)


def test_the_model_is_its_layers_and_the_rest():
    """Every kind's FLOPs are in those of a decoder with all of them, once a layer."""
    (decoder,) = (subject for subject in FAMILY_SUBJECTS if subject.family == "decoder")
    config = decoder.configuration(ONE_DEVICE).model
    flops = decoder.configuration(ONE_DEVICE).family.flops_per_token
    without = flops(config.model_copy(update={"num_layers": config.num_layers - 1}), LENGTH)
    layer = sum(sum(KINDS[symbol].flops(config, LENGTH).values()) for symbol in decoder.settings["pattern"])
    assert flops(config, LENGTH) - without == pytest.approx(3 * layer)


@pytest.mark.parametrize(
    "subject",
    [
        subject if subject.name == "tests.toy_family" else pytest.param(subject, marks=pytest.mark.slow)
        for subject in (*FAMILY_SUBJECTS, *KIND_SUBJECTS)
    ],
    ids=str,
)
def test_first_values_do_not_depend_on_the_mesh(subject: Subject):
    alone, found = (first_values(subject, layout) for layout in (ONE_DEVICE, STAGES))
    assert alone.keys() == found.keys()
    for name, value in alone.items():
        assert np.array_equal(value, found[name]), name


def first_values(subject: Subject, layout: Layout) -> dict[str, np.ndarray]:
    """In the model's order, by name."""
    with use(rules_for(dict(layout.mesh), layout.zero)):
        trainer = make_trainer(subject.configuration(layout))
        return by_name(trainer.blueprint.initialize(jax.random.key(7)), trainer)

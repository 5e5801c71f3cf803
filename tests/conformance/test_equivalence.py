"""Of every family and kind of layer: a step on any mesh is plain differentiation of layer after layer on one device.

Unmarked are each family on the mesh that differs most from one device; the kinds are in the decoder's pattern there.
"""

import numpy as np
import pytest

from tests.conformance.communication import Communication
from tests.conformance.runs import assert_same, reference, rehearsed, step
from tests.conformance.subjects import (
    ADAPTED,
    FAMILY_SUBJECTS,
    KIND_SUBJECTS,
    ONE_DEVICE,
    OPTION_SUBJECTS,
    Layout,
    Subject,
)

CUBE = Layout({"data": 2, "fsdp": 2, "tensor": 2})
PIPE = Layout({"pipe": 2, "data": 2, "tensor": 2}, schedule="interleaved", parts=2, microbatches=4)
CONTEXT = Layout({"fsdp": 2, "context": 4})
SPLIT_BACKWARD = Layout({"pipe": 2, "fsdp": 2, "tensor": 2}, schedule="zero_bubble_v", parts=2, microbatches=4)
LAYOUTS = (
    ONE_DEVICE,
    CUBE,
    PIPE,
    Layout({"data": 8}, zero="none", microbatches=1),
    Layout({"data": 2, "tensor": 4}, zero="parameters"),
    CONTEXT,
    Layout({"context": 2, "tensor": 2}, context={"method": "all_to_all"}),
    Layout({"pipe": 2, "data": 2, "tensor": 2}, schedule="1f1b", microbatches=4),
    Layout({"pipe": 2, "fsdp": 2}, schedule="zero_bubble", microbatches=4, zero="none"),
    SPLIT_BACKWARD,
    Layout({"pipe": 2, "data": 2, "context": 2}, schedule="dualpipe_v", parts=2, microbatches=4, zero="parameters"),
)
# the decoder has all kinds of layers: the equivalence tests of tests/train hold some of them in the short suite
QUICK = {"tests.toy_family": PIPE, "gemma": CUBE}
# a kind alone, in case others hide it: those of the house are in the decoder's pattern on all meshes
OF_KINDS = (CONTEXT, SPLIT_BACKWARD)
CASES = [(subject, layout) for subject in FAMILY_SUBJECTS for layout in LAYOUTS if subject.fits(layout)]
CASES += [(subject, layout) for subject in KIND_SUBJECTS for layout in OF_KINDS]
# one that splits heads over tensor, the sequence or the stages, other rows and weights
OF_OPTIONS = {
    "answers": (CUBE, CONTEXT, SPLIT_BACKWARD),
    "gemma": (CUBE, CONTEXT),
    "neox": (Layout({"data": 2, "tensor": 4}, zero="parameters"), SPLIT_BACKWARD),
    "olmo": (PIPE, Layout({"fsdp": 2, "context": 2, "tensor": 2})),
}
CASES += [(subject, layout) for subject in OPTION_SUBJECTS for layout in OF_OPTIONS[subject.name]]


@pytest.mark.parametrize(
    ("subject", "layout"),
    [
        pytest.param(subject, layout, marks=() if QUICK.get(subject.name) is layout else pytest.mark.slow)
        for subject, layout in CASES
    ],
    ids=str,
)
def test_the_step_is_plain_differentiation_and_communicates_as_laid_out(subject: Subject, layout: Layout):
    found = step(subject, layout)
    assert_same(found, reference(subject), subject.tolerance)
    Communication(found, layout.mesh).check()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [CUBE, PIPE, CONTEXT], ids=str)
def test_adapters_are_trained_alike_on_every_mesh(layout: Layout):
    found = step(ADAPTED, layout)
    assert_same(found, reference(ADAPTED))
    # `b` is not 0 here, and each adapter is used: none lies beside weights that are read without it
    assert found.gradients and all(np.abs(gradient).max() > 0 for gradient in found.gradients.values())


@pytest.mark.slow
@pytest.mark.parametrize("subject", FAMILY_SUBJECTS, ids=str)
def test_a_step_compiled_for_gpus_communicates_as_laid_out(subject: Subject):
    Communication(rehearsed(subject, CUBE), CUBE.mesh).check()


@pytest.mark.parametrize("changes", [{"collectives": ()}, {"num_counts": -1000}], ids=["nothing is sent", "too much"])
def test_communication_that_is_not_as_laid_out_is_noticed(changes):
    subject, layout = FAMILY_SUBJECTS[1], PIPE
    with pytest.raises(AssertionError):
        Communication(step(subject, layout)._replace(**changes), layout.mesh).check()

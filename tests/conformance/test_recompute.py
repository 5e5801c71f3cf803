"""Of every family and kind of layer: what is recomputed changes no number, and `full` keeps a layer's input alone."""

import math

import pytest

from jaxtron.models.decoder.kinds import KINDS, LayerKind
from jaxtron.plan.resident import resident
from jaxtron.run.batches import abstract_batch
from jaxtron.run.session import make_trainer
from jaxtron.sharding.rules import use
from tests.conformance.runs import assert_same, step
from tests.conformance.subjects import KIND_SUBJECTS, SUBJECTS, Layout, Subject
from tests.support.equivalence import rules_for
from tests.support.toy_kind import WAVE, wave_known

LAYOUT = Layout({"fsdp": 2, "tensor": 2})
DECODERS = [subject for subject in SUBJECTS if subject.family == "decoder"]


def kept(subject: Subject, recompute: object) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and types of what layers leave for their backward; traced, nothing computed."""
    config = subject.configuration(LAYOUT, recompute=recompute)
    with use(rules_for(dict(LAYOUT.mesh))):
        held = resident(make_trainer(config), abstract_batch(config))[1]
    return [(array.shape, array.dtype.name) for array in held.stacks[0].residuals]


@pytest.mark.parametrize("subject", DECODERS, ids=str)
def test_full_keeps_the_inputs_of_layers_alone(subject: Subject):
    config = subject.configuration(LAYOUT).model
    full, none = kept(subject, "full"), kept(subject, "none")
    ((shape, dtype),) = full
    assert shape[-1] == config.hidden_size and shape[1] == config.layout.repeats and dtype == "float32"
    assert (shape, dtype) in none and len(none) > 1


def nameable(kind: LayerKind) -> tuple[str, ...]:
    """Regions that `model.recompute` can name: its type knows those of the house's kinds."""
    return () if kind is WAVE else kind.regions


def choices() -> list[tuple[Subject, object]]:
    """Every choice that `model.recompute` has: a region where its kind is alone, and what is not named for all."""
    found: list[tuple[Subject, object]] = []
    for subject in DECODERS:
        kinds = [KINDS[symbol] for symbol in subject.settings["pattern"] if symbol not in "()"]
        found += [(subject, (region,)) for region in (nameable(KINDS[subject.kind]) if subject.kind else ())]
        attends = any(kind.selective for kind in kinds)
        found += [(subject, "full"), *((subject, name) for name in ("selective", "all_but_cores") if attends)]
    return found


with wave_known():
    CHOICES = choices()


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "recompute"), CHOICES, ids=str)
def test_what_is_recomputed_changes_no_number(subject: Subject, recompute: object):
    """Against the step that computes nothing again, which `test_equivalence.py` holds to plain differentiation."""
    assert_same(step(subject, LAYOUT, recompute=recompute), step(subject, LAYOUT, recompute="none"), subject.tolerance)


@pytest.mark.parametrize("subject", KIND_SUBJECTS, ids=str)
def test_a_recomputed_region_keeps_less(subject: Subject):
    def size(recompute: object) -> int:
        return sum(math.prod(shape) for shape, _ in kept(subject, recompute))

    for region in nameable(KINDS[subject.kind]):
        assert size([region]) < size("none"), region

"""`|` in a pattern: where pipeline stages begin."""

import pytest

from jaxtron.config import UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.pattern import parse


@pytest.mark.parametrize(
    ("text", "period", "parts"),
    [
        ("*-*-|*-*-*-", "*-", (2, 3)),
        ("*-|*-|*-|*-", "*-", (1, 1, 1, 1)),
        ("(*-)|(*-)(*-)", "(*-)", (1, 2)),
        ("**-**-|**-", "**-", (2, 1)),
        ("-|--", "-", (1, 2)),
    ],
)
def test_parts_are_counted_in_periods(text, period, parts):
    cut, whole = parse(text), parse(text.replace("|", ""))
    assert cut.parts == parts and whole.parts is None
    assert cut.layers == whole.layers == parse(period, sum(parts)).layers
    assert (cut.period, cut.repeats) == (whole.period, sum(parts))


@pytest.mark.parametrize(
    ("text", "parts"), [("*-|*-*", (2, 3)), ("*|-*-", (1, 3)), ("*-*|*-*|*-", (3, 3, 2)), ("(*-)-|M", (2, 1))]
)
def test_elsewhere_parts_are_counted_in_layers(text, parts):
    cut = parse(text)
    assert cut.mixed and cut.parts == parts and cut.looped == sum(parts) == len(cut.layers)
    assert cut.layers == parse(text.replace("|", "")).layers


@pytest.mark.parametrize("text", ["|*-", "*-|", "*-||*-", "|"])
def test_a_cut_without_layers_on_both_sides(text):
    with pytest.raises(UserError, match="no layers on one side of this cut"):
        parse(text)


def test_cuts_are_for_all_layers():
    with pytest.raises(UserError, match="cannot repeat 4 times; set model.num_layers 1"):
        parse("*-|*-", 4)
    with pytest.raises(ValueError, match="set model.num_layers 1"):
        ModelConfig(pattern="*-|*-")
    with pytest.raises(UserError, match=r"symbol 3: unknown symbol '\|'"):
        parse("(*|-)")


def test_a_model_with_cuts_is_the_model_without():
    cut, whole = ModelConfig(pattern="*-|*-*-", num_layers=1), ModelConfig(num_layers=3)
    assert cut.layout.layers == whole.layout.layers and cut.output_std == whole.output_std

"""The pattern language."""

import pytest

from jaxtron.config import UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.models.decoder.pattern import hybrid_pattern, layer_kinds, layer_name, parse

ATTENTION, MLP, PARALLEL = ("*",), ("-",), ("*", "-")


@pytest.mark.parametrize(
    ("text", "repeats", "layers"),
    [
        ("*-", 1, [ATTENTION, MLP]),
        ("*-", 3, [ATTENTION, MLP] * 3),
        ("(*-)", 2, [PARALLEL] * 2),
        ("*(*-)--", 1, [ATTENTION, PARALLEL, MLP, MLP]),
        ("*", 1, [ATTENTION]),
    ],
)
def test_layers_in_order(text, repeats, layers):
    assert list(parse(text, repeats).layers) == layers


@pytest.mark.parametrize(
    ("text", "repeats", "period", "times"),
    [
        ("*-", 12, 2, 12),
        ("*-*-", 3, 2, 6),
        ("**--", 2, 4, 2),
        ("*-*", 1, 3, 1),
        ("----", 1, 1, 4),
        ("(*-)(*-)", 1, 1, 2),
        # not a repetition of *-, although it begins as one
        ("*-*-*", 1, 5, 1),
    ],
)
def test_is_reduced_to_its_smallest_period(text, repeats, period, times):
    pattern = parse(text, repeats)
    assert (len(pattern.period), pattern.repeats) == (period, times)


@pytest.mark.parametrize(
    ("text", "repeats", "kinds"),
    [
        ("*-*", 1, ["attention", "mlp"]),
        ("M-M*-", 1, ["attention", "mlp", "mamba"]),
        ("*(*-)W--L", 1, ["attention", "attention_mlp", "window_attention", "latent_attention", "mlp"]),
        # repeated, but only after many layers
        ("M-M*-M-MM", 2, []),
        ("M-M*-M-MM-M-M-M-*", 2, ["attention", "mlp", "mamba"]),
        # no two layers are alike, or a short period says it all
        ("*-", 1, []),
        ("W-*-", 3, []),
    ],
)
def test_layers_by_kind_where_periods_say_nothing(text, repeats, kinds):
    pattern = parse(text, repeats)
    assert pattern.mixed == bool(kinds) and list(pattern.kinds) == kinds
    if kinds:
        assert pattern.looped == len(pattern.layers) and [pattern.kinds[kind] for kind in layer_kinds(pattern)] == list(
            pattern.layers
        )


def test_every_kind_has_a_name_of_its_own():
    names = [layer_name((symbol,)) for symbol in KINDS]
    assert len(set(names)) == len(KINDS)


def test_counts_include_both_sides_of_a_parallel_layer():
    pattern = parse("*(*-)--", 2)
    assert (pattern.count("*"), pattern.count("-")) == (4, 6)


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("*x", 2, "unknown symbol 'x'"),
        ("*-X", 3, "unknown symbol 'X'"),
        ("* -", 2, "unknown symbol ' '"),
        ("*)", 2, "unknown symbol '\\)'"),
        ("*(*-", 2, "closing"),
        ("(*)", 1, "two or more"),
        ("()", 1, "two or more"),
        ("*(*x)", 4, "unknown symbol 'x'"),
        ("((*-)", 2, "unknown symbol '\\('"),
        ("-(*W)", 2, "two kinds of attention"),
    ],
)
def test_bad_text_names_the_place_and_the_reason(text, place, why):
    with pytest.raises(UserError, match=f"symbol {place}: .*{why}") as error:
        parse(text)
    assert repr(text) in str(error.value) and "* attention, W attention in a window, L latent attention, - MLP" in str(
        error.value
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shares", "pattern"),
    [
        # Megatron's own, of 8 billion and 800 million parameters (examples/mamba/train.sh)
        ((0.08, 0.5, 56), "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"),
        ((0.08, 0.5, 48), "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"),
        ((0.0, 0.0, 3), "MMM"),
        ((1.0, 0.0, 2), "**"),
        ((0.5, 0.5, 4), "-**-"),
    ],
)
def test_a_hybrid_by_shares(shares, pattern):
    assert hybrid_pattern(*shares) == pattern
    found = ModelConfig(hybrid=shares, num_heads=4, position="none")
    assert (found.pattern, found.num_layers) == (pattern, 1)
    # as a run's directory has it
    assert ModelConfig(**found.model_dump()) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hybrid": (0.6, 0.5, 10)}, "model.hybrid 0.6 0.5 10: shares .* together 1 at most"),
        ({"hybrid": (-0.1, 0.5, 10)}, "shares of attention and MLPs are 0 or more"),
        ({"hybrid": (0.1, 0.5, 0)}, "the last is the number of layers, from 1 to 65,536"),
        ({"hybrid": (0.0, 0.0, 3), "pattern": "M"}, "model.pattern M has no effect .* hybrid makes it MMM"),
        ({"hybrid": (0.0, 0.0, 3), "num_layers": 3}, "model.num_layers 3 has no effect .* hybrid makes it 1"),
    ],
    ids=str,
)
def test_shares_that_make_no_hybrid(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize(("text", "repeats"), [("", 1), ("", 3), ("*-", 0)])
def test_a_decoder_without_layers_is_an_error(text, repeats):
    with pytest.raises(UserError, match="has no layer"):
        parse(text, repeats)


def test_a_symbol_twice_in_a_group_is_an_error():
    # its two branches would be one and the same module
    with pytest.raises(UserError, match="\\(\\*\\*\\)"):
        parse("(**)")

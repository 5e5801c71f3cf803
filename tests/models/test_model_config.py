"""What a decoder's configuration derives and refuses."""

import math

import pytest

from jaxtron.config import UserError, load
from jaxtron.models.decoder.config import ModelConfig


def test_defaults_follow_the_width():
    config = ModelConfig(hidden_size=96, num_heads=6)
    assert (config.kv_heads, config.head_size, config.mlp_width) == (6, 16, 384)
    assert ModelConfig(hidden_size=96, num_heads=6, num_kv_heads=2, head_dim=32, mlp_size=100).mlp_width == 100


@pytest.mark.parametrize(("hidden", "width"), [(768, 2048), (4096, 10880), (96, 256), (16, None)])
def test_gated_mlps_have_two_thirds_of_the_width(hidden, width):
    if width is None:
        # two thirds of 64 is below the step of 64: not a silent width of 0
        with pytest.raises(ValueError, match="mlp_size"):
            assert ModelConfig(hidden_size=hidden, num_heads=1, activation="swiglu").mlp_width
    else:
        assert ModelConfig(hidden_size=hidden, num_heads=1, activation="geglu").mlp_width == width


@pytest.mark.parametrize(
    ("vocab", "multiple", "padded"),
    [(50257, 128, 50304), (50257, 1024, 51200), (257, 128, 384), (256, 128, 256), (1, 8, 8), (50257, 1, 50257)],
)
def test_vocabulary_is_padded_to_a_multiple(vocab, multiple, padded):
    # Megatron: 128 times the tensor parallel size
    assert ModelConfig(vocab_size=vocab, vocab_multiple=multiple).padded_vocab == padded


@pytest.mark.parametrize(
    ("pattern", "repeats", "branches"), [("*-", 12, 24), ("(*-)", 5, 10), ("**-", 4, 12), ("*-*-", 3, 12), ("-", 7, 7)]
)
def test_projections_back_are_scaled_by_depth(pattern, repeats, branches):
    # GPT-2 and Megatron: 2 x layers; of other patterns Megatron's hybrids count each branch as a layer of its own
    config = ModelConfig(pattern=pattern, num_layers=repeats, initial_std=0.01, position="none")
    assert config.num_branches == branches
    assert config.output_std == pytest.approx(0.01 / math.sqrt(branches))


def test_a_changed_copy_has_its_own_layout():
    config = ModelConfig(num_layers=2)
    assert config.layout.repeats == 2
    assert config.model_copy(update={"num_layers": 5}).layout.repeats == 5


@pytest.mark.parametrize(
    ("recompute", "names"),
    [
        ("none", set()),
        ("selective", {"attention_core"}),
        ("all_but_cores", {"layer"}),
        ("full", {"layer"}),
        (["mlp", "attention"], {"mlp", "attention"}),
    ],
)
def test_recomputed_regions(recompute, names):
    assert ModelConfig(recompute=recompute).recomputed == names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "100", "--num_heads", "12"], "hidden_size 100 is not a multiple of model.num_heads 12"),
        (["--num_kv_heads", "5"], "num_heads 12 is not a multiple of model.num_kv_heads 5"),
        (["--pattern", "*-x"], "symbol 3: unknown symbol 'x'"),
        (["--num_layers", "0"], "num_layers"),
        (
            ["--position", "alibi", "--rotary.base", "5e5"],
            "model.rotary.base 500000.0 has no effect with model.position alibi",
        ),
        (
            ["--position", "none", "--max_positions", "8"],
            "model.max_positions 8 has no effect with model.position none",
        ),
        (["--position", "alibi", "--pattern", "-"], "model.position alibi has no effect with model.pattern -"),
        (["--latent.kv_lora_rank", "64"], r"model.latent.kv_lora_rank 64 .* add latent attention \(L\) to the pattern"),
        (["--pattern", "L-", "--position", "alibi"], "latent attention .L. has none; use --model.position rotary"),
        (["--pattern", "L-", "--attention.sinks", "true"], "model.attention.sinks true: latent attention .L. has none"),
        (["--pattern", "L-", "--attention.output_gate", "true"], "model.attention.output_gate true: latent attention"),
        (["--branch_norms", "true"], r"model.branch_norms true has no effect .* put branches into a group"),
        (
            ["--pattern", "(*-)", "--branch_norms", "true", "--norm_placement", "output"],
            "model.branch_norms true has no effect with model.norm_placement output",
        ),
        (
            ["--norm", "rms_norm_1p", "--norm_bias", "true"],
            "model.norm_bias true has no effect with model.norm rms_nor",
        ),
        (["--window_rotary.base", "5"], "model.window_rotary.base 5.0 has no effect with model.position learned"),
        (["--position", "rotary", "--window_rotary.base", "5"], r"window_rotary.* add attention in a window \(W\)"),
        (
            "--position rotary --pattern W- --attention.window 4 --window_rotary.base 5".split(),
            "window_rotary.* all of its attention is in a window: say so by model.rotary",
        ),
        (
            "--position rotary --rotary.scaling.kind longrope --rotary.scaling.short_factors 1 2 "
            "--rotary.scaling.long_factors 1 2".split(),
            "model.rotary.scaling.short_factors has 2 numbers, and 64 rotated dimensions have 32 pairs",
        ),
        (["--qk_norm", "both"], "qk_norm: expected true | false | each_head | projection, got 'both'"),
        (["--pattern", "M", "--position", "none", "--mamba.inner_norms", "true"], r"inner_norms.* add Mamba \(m\)"),
        (["--pattern", "L-", "--num_kv_heads", "2"], "model.num_kv_heads 2 has no effect with model.pattern L-"),
        (["--activation", "gelu_fast"], "activation"),
        (["--dropout", "1.0"], "dropout"),
        (["--recompute", "everything"], "recompute"),
        (["--norm", "batch_norm"], "layer_norm"),
        (["--heads", "4"], "unknown setting heads.*num_heads"),
    ],
)
def test_errors_are_one_line_with_the_values(flags, message):
    with pytest.raises(UserError, match=message) as error:
        load(ModelConfig, None, flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ignored",
    [
        {"pattern": "*", "mlp_size": 64},
        {"pattern": "*", "activation": "swiglu"},
        {"pattern": "-", "position": "none", "num_kv_heads": 1},
        {"pattern": "-", "position": "none", "attention_output_bias": True},
        {"pattern": "*", "mlp_bias": False},
        {"pattern": "-", "position": "none", "qk_norm": True},
        {"pattern": "-", "position": "none", "attention_dropout": 0.1},
        {"pattern": "-", "position": "none", "recompute": "selective"},
        {"pattern": "-", "position": "none", "recompute": "all_but_cores"},
        {"pattern": "*", "recompute": ["mlp"]},
        {"recompute": ["attention", "attention_core"]},
    ],
    ids=str,
)
def test_a_setting_without_effect_is_an_error(ignored):
    with pytest.raises(ValueError, match="effect"):
        ModelConfig(**ignored)

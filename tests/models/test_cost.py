"""Floating-point operations against the papers' formulas."""

import pytest

from jaxtron.models.config import ModelConfig
from jaxtron.models.cost import model_flops_per_token


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "vocab", "length"),
    [(24, 2304, 24, 51200, 2048), (96, 12288, 96, 51200, 2048), (128, 25600, 160, 51200, 2048), (4, 128, 4, 128, 64)],
)
def test_gpt_costs_what_equation_seven_says(layers, hidden, heads, vocab, length):
    # Korthikanti et al. (2205.05198), Eq. 7, per token; the sizes are those of Narayanan et al. (2104.04473), Table 1
    config = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        vocab_size=vocab,
        vocab_multiple=128,
        max_positions=length,
    )
    expected = 72 * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (12 * layers * hidden))
    assert model_flops_per_token(config, length) == pytest.approx(expected, rel=1e-12)


def test_one_trillion_parameters():
    # 2104.04473, Sec. 5.1: 450 billion tokens on 3072 GPUs at 163 teraFLOP/s in 84 days, by 8 FLOPs a parameter and
    # token; that is a forward recomputed, 4/3 of the model's, and the part quadratic in the sequence left out
    config = ModelConfig(
        num_layers=128, hidden_size=25600, num_heads=160, vocab_size=51200, max_positions=2048, vocab_multiple=1024
    )
    total = 450e9 * model_flops_per_token(config, 2048) * 4 / 3
    assert total / (3072 * 163e12) / 86400 == pytest.approx(84, rel=0.02)


def test_llama_counts_every_product():
    # Llama 3 8B: grouped heads, three matrices in the MLP, its own head
    config = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_size=14336,
        vocab_size=128256,
        activation="swiglu",
        norm="rms_norm",
        bias=False,
        position="rotary",
        tied_head=False,
    )
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    scores_and_mixing = 32 * 2 * 4096 * 8192
    assert model_flops_per_token(config, 8192) == 6 * (matrices + scores_and_mixing)


def test_patterns_count_their_symbols():
    def cost(pattern, repeats=1):
        config = ModelConfig(pattern=pattern, num_layers=repeats, hidden_size=64, num_heads=4, max_positions=32)
        return model_flops_per_token(config, 32)

    assert cost("(*-)", 3) == cost("*-", 3) == cost("***---")
    # what a layer more costs is what it costs anywhere
    assert cost("*--") - cost("*-") == cost("--") - cost("-")

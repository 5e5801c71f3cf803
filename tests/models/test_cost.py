"""Floating-point operations against the papers' formulas."""

import math

import jax
import pytest

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.cost import (
    hardware_flops_per_token,
    model_flops_per_token,
    num_parameters,
    period_parameters,
    table_parameters,
)
from jaxtron.models.decoder.kinds import norm_parameters
from jaxtron.models.program import make_parts
from jaxtron.sharding.rules import use


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
    # in a loop over kinds and in stages as well
    assert cost("*-*|-*-") == cost("*-", 3) and cost("***|--*") == cost("****--")


def test_a_mamba_layer_costs_what_its_heads_do():
    """Channels are those of its heads, whatever they would be over the stream's width."""

    def cost(**mamba):
        mamba |= {"num_groups": 1, "state_size": 16}
        return model_flops_per_token(ModelConfig(pattern="M", num_layers=1, hidden_size=64, mamba=mamba), 32)

    assert cost(num_heads=8, head_dim=16) == cost(head_dim=16)
    # gate, values, output and step of two heads more, and the 7 of each number of their states
    assert cost(num_heads=10, head_dim=16) - cost(head_dim=16) == 3 * (2 * 64 * (3 * 32 + 2) + 7 * 32 * 16)


def forward_flops(pattern: str, **sizes) -> float:
    """Of a token's forward through one layer 64 wide."""
    config = ModelConfig(pattern=pattern, num_layers=1, hidden_size=64, position="none", **sizes)
    return model_flops_per_token(config, 32) / 3 - 2 * 64 * config.padded_vocab


def test_a_mamba_1_layer_costs_its_products_and_seven_a_number_of_its_states():
    # 96 channels; x and z, steps of 5 numbers with B and C of 16, steps of all channels, output
    products = 64 * 2 * 96 + 96 * (5 + 2 * 16) + 5 * 96 + 96 * 64
    mamba = {"expand": 1.5, "state_size": 16, "dt_rank": 5}
    assert forward_flops("m", mamba=mamba) == 2 * products + 7 * 96 * 16 == 55_680


def test_a_gated_delta_net_costs_its_products_and_seven_a_number_of_its_states():
    # 2 queries and keys of 8, 6 values of 4; q and k, v, z and output, b and a
    products = 64 * (2 * 2 * 8) + 3 * 64 * (6 * 4) + 2 * 64 * 6
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 6}
    delta = {**heads, "linear_key_head_dim": 8, "linear_value_head_dim": 4}
    assert forward_flops("G", delta=delta) == 2 * products + 7 * 6 * 4 * 8 == 16_192


SMALL = {"num_layers": 3, "hidden_size": 48, "num_heads": 4, "vocab_size": 100, "vocab_multiple": 16}


CHANGES = [
    {"max_positions": 64},
    {"position": "rotary", "norm": "rms_norm", "tied_head": False, "num_kv_heads": 2, "qk_norm": True},
    {"position": "alibi", "embedding_norm": True, "qk_norm": True, "head_dim": 24},
    {"position": "rotary", "bias": False, "qkv_bias": True, "activation": "swiglu"},
    {"position": "none", "qkv_bias": False, "activation": "geglu", "mlp_size": 40, "norm": "layer_norm_1p"},
    {"position": "rotary", "pattern": "(*-)", "bias": False, "num_kv_heads": 1, "head_dim": 8},
    {"position": "rotary", "bias": False, "norm_bias": True, "norm": "layer_norm_1p", "activation": "squared_relu"},
    {"position": "rotary", "pattern": "(*-)", "branch_norms": True, "attention_output_bias": False, "head_bias": True},
    {"position": "rotary", "norm_placement": "output", "num_kv_heads": 2, "qk_norm": "projection", "qkv_bias": False},
    {
        **{"position": "none", "pattern": "*-(*-)", "norm_placement": "both", "branch_norms": True, "num_kv_heads": 1},
        **{"qk_norm": "each_head", "mlp_bias": False, "attention": {"output_gate": True}, "tied_head": False},
    },
    {"position": "none", "pattern": "*--*"},
    {"position": "none", "pattern": "-"},
]
BIASED = {"num_experts": 4, "shared_size": 32, "shared_gate": True}


@pytest.mark.parametrize("changes", [*CHANGES, {"position": "none", "pattern": "*E", "moe": BIASED}])
def test_parameters_are_those_of_the_real_model(changes, rules_for):
    config = ModelConfig(**SMALL, **changes)
    with use(rules_for()):
        plan = make_parts(config, "float32").blueprint
    # the length counts only where there is a table of positions without a size of its own
    assert num_parameters(config, 17) == plan.num_parameters


@pytest.mark.parametrize("changes", CHANGES)
def test_parameters_of_a_tensor_part_are_those_of_a_device(changes, rules_for):
    # key and value heads that four parts do not split are on all of them; output biases and norms are whole
    config = ModelConfig(**SMALL, **changes)
    with use(rules_for(tensor=4)):
        plan = make_parts(config, "float32").blueprint
        device = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(plan.abstract))
    norms = (1 + config.embedding_norm) * norm_parameters(config, config.hidden_size)
    layers = config.layout.repeats * period_parameters(config, 4)
    assert device == table_parameters(config, 17, 4) + norms + layers


def test_positions_are_as_many_as_the_sequence_is_long():
    config = ModelConfig(**SMALL)
    assert num_parameters(config, 33) - num_parameters(config, 32) == 48


def test_what_is_recomputed_costs_its_forward_again():
    def hardware(recompute):
        return hardware_flops_per_token(ModelConfig(**SMALL, recompute=recompute), 32)

    model = model_flops_per_token(ModelConfig(**SMALL), 32)
    assert hardware("none") == model
    # scores and what they mix: 2 products of a sequence and all heads' channels, 3 layers
    core = 3 * 2 * 2 * 32 * 48
    projections, mlp = 3 * 2 * 4 * 48 * 48, 3 * 2 * 2 * 48 * 192
    assert hardware("selective") - model == core
    assert hardware(("attention",)) - model == projections + core
    assert hardware(("attention_core", "mlp")) - model == core + mlp
    assert hardware("full") - model == projections + core + mlp
    assert hardware("all_but_cores") - model == projections + mlp

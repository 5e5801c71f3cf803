"""Arguments as settings: each that means something here, and every other refused by its name."""

from pathlib import Path
from typing import Any

import pytest

from jaxtron.config import UserError, load
from jaxtron.generate.source import ModelSource, read_model
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.configuration import Configuration
from jaxtron.weights.hub import hub_settings, is_hub
from jaxtron.weights.megatron.arguments import LISTED
from tests.megatron import fixtures
from tests.megatron.writer import named, namespace, torch_zip
from tests.weights.megatron.models import ARGS, EXPERTS, GPT2


def model_of(folder: Path, args: dict[str, Any]) -> ModelConfig:
    """The settings that arguments make; `...` takes one out."""
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in args.items() if value is not ...}
    path.write_bytes(torch_zip({"args": namespace(given), "model": {}, "checkpoint_version": 3.0}))
    assert is_hub(folder)
    return load(Configuration, None, ["--data.sequence_length", "16"], under=hub_settings(folder)).model


def test_a_model_with_everything(tmp_path: Path):
    common = {
        "num_layers": 4,
        "hidden_size": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "mlp_size": 12,
        "vocab_size": 32,
        "vocab_multiple": 16,
        "activation": "swiglu",
        "norm": "rms_norm",
        "bias": False,
        "position": "rotary",
        "tied_head": False,
    }
    assert model_of(tmp_path, ARGS) == ModelConfig.model_validate(common)
    moe = {
        "num_experts": 4,
        "top_k": 2,
        "expert_size": 10,
        "shared_size": 6,
        "shared_gate": True,
        "scores": "topk_softmax",
    }
    assert model_of(tmp_path, EXPERTS) == ModelConfig.model_validate({**common, "pattern": "*E", "moe": moe})
    plain = {"num_kv_heads": 4, "activation": "gelu_tanh", "norm": "layer_norm", "norm_bias": True, "bias": True}
    plain |= {"position": "learned", "max_positions": 16, "tied_head": True}
    assert model_of(tmp_path, GPT2) == ModelConfig.model_validate({**common, **plain})


SAID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_query_groups": 1, "group_query_attention": False}, {"num_kv_heads": 4}),
    ({"kv_channels": None}, {"head_dim": 2}),
    ({"kv_channels": ..., "group_query_attention": ...}, {"head_dim": 2, "num_kv_heads": 4}),
    ({"ffn_hidden_size": None}, {"mlp_size": 32}),
    ({"norm_epsilon": 1e-6}, {"norm_epsilon": 1e-6}),
    ({"layernorm_epsilon": 1e-6, "norm_epsilon": 1e-5}, {"norm_epsilon": 1e-6}),
    ({"padded_vocab_size": 33}, {"vocab_size": 33, "vocab_multiple": 1}),
    ({"add_qkv_bias": True}, {"qkv_bias": True, "bias": False}),
    ({"normalization": "LayerNorm"}, {"norm": "layer_norm", "norm_bias": True, "bias": False}),
    ({"normalization": "LayerNorm", "apply_layernorm_1p": True}, {"norm": "layer_norm_1p"}),
    ({"normalization": "RMSNorm", "apply_layernorm_1p": True}, {"norm": "rms_norm"}),
    ({"swiglu": False}, {"activation": "gelu"}),
    ({"swiglu": False, "add_bias_linear": True}, {"activation": "gelu_tanh"}),
    ({"swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": False}, {"activation": "gelu"}),
    ({"swiglu": False, "openai_gelu": True}, {"activation": "gelu_tanh"}),
    ({"swiglu": False, "squared_relu": True}, {"activation": "squared_relu"}),
    (
        {"swiglu": False, "quick_geglu": True, "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
        {"activation": "clamped_swiglu"},
    ),
    ({"position_embedding_type": "none"}, {"position": "none"}),
    ({"position_embedding_type": ..., "use_rotary_position_embeddings": True}, {"position": "rotary"}),
    ({"position_embedding_type": ..., "add_position_embedding": False}, {"position": "none"}),
    ({"position_embedding_type": ...}, {"position": "learned", "max_positions": 16}),
    ({"rotary_base": 500000, "rotary_percent": 0.5}, {"rotary.base": 5e5, "rotary.fraction": 0.5}),
    ({"use_rope_scaling": True}, {"rotary.scaling.factor": 8.0, "rotary.scaling.original_length": 8192}),
    ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, {"rotary.scaling.factor": 32.0}),
    ({"qk_layernorm": True}, {"qk_norm": True}),
    ({"softmax_type": "learnable"}, {"attention.sinks": True}),
    ({"window_size": (127, 0)}, {"pattern": "W-", "attention.window": 128}),
    ({"window_size": (127, 0), "window_attn_skip_freq": 2}, {"pattern": "W-*-W-*-", "num_layers": 1}),
    ({"window_size": [3, 0], "window_attn_skip_freq": [1, 1, 1, 0]}, {"pattern": "W-W-W-*-", "attention.window": 4}),
    ({"init_method_std": 0.01}, {"initial_std": 0.01}),
    ({"untie_embeddings_and_output_weights": False}, {"tied_head": True}),
]
OF_EXPERTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"moe_layer_freq": 2}, {"pattern": "*E*-*E*-", "num_layers": 1}),
    ({"moe_layer_freq": [0, 1, 1, 1]}, {"pattern": "*E", "num_layers": 4, "moe.leading_dense": 1}),
    ({"moe_layer_freq": "([0]*1+[1]*1)*2"}, {"pattern": "*-*E*-*E", "num_layers": 1}),
    ({"moe_ffn_hidden_size": None}, {"moe.expert_size": 12}),
    ({"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}, {"moe.shared_size": 0}),
    ({"moe_router_pre_softmax": True}, {"moe.scores": "softmax", "moe.renormalize": False}),
    ({"moe_router_score_function": "sigmoid"}, {"moe.scores": "sigmoid", "moe.renormalize": True}),
    ({"moe_router_score_function": "sigmoid", "moe_router_topk": 1}, {"moe.renormalize": False, "moe.top_k": 1}),
    ({"moe_router_topk_scaling_factor": 2.5, "moe_router_pre_softmax": True}, {"moe.scaling": 2.5}),
    ({"moe_router_enable_expert_bias": True, "moe_router_pre_softmax": True}, {"moe.bias_rate": 0.001}),
    (
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_pre_softmax": True},
        {"moe.groups": 2, "moe.top_groups": 1, "moe.group_score": "two_largest"},
    ),
    ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, {"moe.groups": 4, "moe.group_score": "largest"}),
    ({"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]}, {"moe.num_experts": 4}),
]


def check_settings(model: ModelConfig, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        found: Any = model
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name


@pytest.mark.parametrize(("changes", "expected"), SAID, ids=[" ".join(row[0]) for row in SAID])
def test_what_an_argument_says(changes: dict, expected: dict, tmp_path: Path):
    check_settings(model_of(tmp_path, ARGS | changes), expected)


@pytest.mark.parametrize(("changes", "expected"), OF_EXPERTS, ids=[" ".join(row[0]) for row in OF_EXPERTS])
def test_what_an_argument_says_of_experts(changes: dict, expected: dict, tmp_path: Path):
    check_settings(model_of(tmp_path, EXPERTS | changes), expected)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (ARGS, {"hidden_size": "8"}, "hidden_size '8': it must be a whole number from 1"),
    (ARGS, {"hidden_size": None}, "hidden_size None: it must be a whole number"),
    (ARGS, {"num_layers": 2**40}, "num_layers 1099511627776: it must be a whole number"),
    (ARGS, {"num_query_groups": 3}, "num_query_groups 3: it must divide num_attention_heads 4"),
    (ARGS, {"tensor_model_parallel_size": 4}, "be a multiple of the tensor-parallel size 4"),
    (
        ARGS,
        {"kv_channels": None, "num_attention_heads": 3, "num_query_groups": 3},
        "hidden_size 8: it is not a multiple",
    ),
    (ARGS, {"normalization": "ScaleNorm"}, "normalization 'ScaleNorm': only LayerNorm, RMSNorm are known here"),
    (ARGS, {"swiglu": "yes"}, "swiglu 'yes': it must be true or false"),
    (ARGS, {"squared_relu": True}, "squared_relu True: swiglu is true too"),
    (ARGS, {"swiglu": False, "quick_geglu": True}, "quick_geglu True: it is known with activation_func_clamp_value 7"),
    (ARGS, {"glu_linear_offset": 1.0}, "glu_linear_offset 1.0: it is known with quick_geglu alone"),
    (ARGS, {"position_embedding_type": "yarn"}, "position_embedding_type 'yarn': only learned_absolute, rope, none"),
    (ARGS, {"rotary_interleaved": True}, "rotary_interleaved True: pairs of neighbours are not known here"),
    (ARGS, {"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor 4: positions that are"),
    (ARGS, {"no_rope_freq": 4}, "no_rope_freq 4: only None is known here"),
    (ARGS, {"softmax_type": "off-by-one"}, "softmax_type 'off-by-one': only vanilla, learnable are known here"),
    (ARGS, {"window_size": (1, 1)}, "window_size '1 1': only windows of tokens before are known here"),
    (ARGS, {"window_size": (7, 0), "window_attn_skip_freq": [1]}, "it must be a number, or a list of 4 of 0 and 1"),
    (ARGS, {"multi_latent_attention": True}, "multi_latent_attention True: only None is known here"),
    (ARGS, {"mtp_num_layers": 1}, "mtp_num_layers 1: only 0 is known here"),
    (ARGS, {"hybrid_layer_pattern": "M*-"}, "hybrid_layer_pattern 'M*-': only None is known here"),
    (ARGS, {"apply_residual_connection_post_layernorm": True}, "only None is known here"),
    (ARGS, {"spec": ["my.module", "spec"]}, "spec 'my.module spec': only None is known here"),
    (ARGS, {"use_mup": True}, "use_mup True: only None is known here"),
    (ARGS, {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0: that argument is not known here, and it may"),
    (ARGS, {"my_flag": True, "other_flag": 1}, "my_flag True: that argument is not known here (and 1 more)"),
    (ARGS, {"my_object": named("megatron.core.mine", "Thing", a=1)}, "my_object 'megatron.core.mine.Thing': that arg"),
    (EXPERTS, {"add_bias_linear": True}, "add_bias_linear True: biases of experts are not known here"),
    (
        EXPERTS,
        {"moe_layer_freq": "__import__('os')"},
        "moe_layer_freq \"__import__('os')\": it must be a number, or a list",
    ),
    (EXPERTS, {"moe_layer_freq": "[1]*99999"}, "it must be a number, or a list of 4 of 0 and 1"),
    (EXPERTS, {"moe_router_score_function": "sqrtsoftplus"}, "only softmax, sigmoid are known here"),
    (EXPERTS, {"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor 1.0: only None is known here"),
    (
        EXPERTS,
        {"moe_router_load_balancing_type": "sinkhorn"},
        "'sinkhorn': experts chosen by such a rule are not known",
    ),
    (EXPERTS, {"moe_router_topk": 4, "moe_router_num_groups": 2, "moe_router_group_topk": 1}, "sum of their 4 largest"),
    (EXPERTS, {"moe_mlp_glu_interleave_size": 32}, "moe_mlp_glu_interleave_size 32: only None is known here"),
]


@pytest.mark.parametrize(("args", "changes", "said"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_may_change_the_model_and_is_not_understood(args: dict, changes: dict, said: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        model_of(tmp_path, args | changes)
    assert said in str(error.value) and "\n" not in str(error.value), error.value
    assert str(tmp_path) in str(error.value)


def test_what_a_user_says_changes_nothing(tmp_path: Path):
    (tmp_path / LISTED).write_text("my_flag\n")
    assert model_of(tmp_path, ARGS | {"my_flag": 3, "my_off_flag": None, "other": False, "list": []}).num_layers == 4
    (tmp_path / LISTED).write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"cannot read .*{LISTED}"):
        model_of(tmp_path, ARGS)


def test_a_file_without_arguments(tmp_path: Path):
    path = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir()
    path.write_bytes(torch_zip({"model": {}}))
    with pytest.raises(UserError, match="has no args, which say what the model is"):
        hub_settings(tmp_path)


def test_what_makes_text_finds_room_and_a_tokenizer(tmp_path: Path):
    model_of(tmp_path, GPT2 | {"max_position_embeddings": 300})
    with pytest.raises(UserError, match="has no tokenizer.json: give --data.tokenizer"):
        read_model(ModelSource(tmp_path))
    assert read_model(ModelSource(tmp_path, ("--data.tokenizer", "bytes"))).room == 300
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hub_settings(tmp_path).tree["data"] == {"tokenizer": str(tmp_path / "tokenizer.json")}


@pytest.mark.parametrize("name", fixtures.NAMES)
def test_all_arguments_of_a_training_are_known(name: str, tmp_path: Path):
    """Some 815 of Megatron-LM Core 0.19."""
    folder = fixtures.unpack(name, tmp_path)
    assert hub_settings(folder / "torch").tree == hub_settings(folder / "torch_dist").tree

"""Settings of `config.json` by families' tables: those of transformers 4 and 5, class defaults, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxtron.config import UserError, format_value, load
from jaxtron.layers.config import RotaryConfig, RotaryScaling
from jaxtron.layers.ssm.config import MambaConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.families import DECODER
from jaxtron.run.configuration import configuration_of
from jaxtron.weights.hub import FAMILIES, config_of, hub_settings, is_hub
from tests.hugging_face import fixtures

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def model_of(folder: Path, config: dict[str, Any]) -> Any:
    """The settings of a config.json; sequences are no longer than GPT-2's positions in the fixtures."""
    (folder / "config.json").write_text(json.dumps(config))
    under = hub_settings(folder)
    config_type = configuration_of(under.tree["model"].get("family", DECODER))
    return load(config_type, None, ["--data.sequence_length", "16"], under=under).model


def fixture_config(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A fixture's, with other values; `...` takes a key out."""
    config = fixtures.load(name).config | changes
    return {key: value for key, value in config.items() if value is not ...}


def test_llama_3_1_as_it_is_on_the_hub(tmp_path: Path):
    # written by transformers 4.42
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 128256,
    }
    expected = ModelConfig.model_validate(
        {
            "num_layers": 32,
            "hidden_size": 4096,
            "num_heads": 32,
            "num_kv_heads": 8,
            "mlp_size": 14336,
            "vocab_size": 128256,
            "activation": "swiglu",
            "norm": "rms_norm",
            "bias": False,
            "position": "rotary",
            "rotary": {
                "base": 5e5,
                "scaling": {
                    "factor": 8.0,
                    "low_frequency_factor": 1.0,
                    "high_frequency_factor": 4.0,
                    "original_length": 8192,
                },
            },
            "tied_head": False,
        }
    )
    assert model_of(tmp_path, config) == expected
    # the same of transformers 5, whose key wins where both are there
    new = {key: value for key, value in config.items() if not key.startswith("rope")}
    new |= {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "bfloat16", "head_dim": None, "rope_theta": 1e4}
    assert model_of(tmp_path, new) == expected


DEFAULTS = {
    "bert": "vocab_size 30522 norm_epsilon 1e-12 norm_placement post pairs next dropout 0.1 activation gelu",
    "megatron-bert": "max_positions 512 norm_epsilon 1e-12 norm_placement pre pairs next token_types 2",
    "t5": "hidden_size 512 head_dim 64 mlp_size 2048 encoder_layers 6 decoder_layers 6 num_buckets 32 max_distance 128 "
    "tied_head true activation relu dropout 0.1 attention_dropout 0.1 norm_epsilon 1e-06 vocab_size 32128",
    "gpt2": "tied_head true max_positions 1024 norm_epsilon 1e-05 activation gelu_tanh num_heads 12",
    "llama": "tied_head false num_kv_heads none norm_epsilon 1e-06 rotary.base 10000.0 pattern *- activation swiglu",
    "mistral": "tied_head false num_kv_heads 8 norm_epsilon 1e-06 pattern W- attention.window 4096",
    "nemotron": "tied_head false norm_epsilon 1e-05 rotary.fraction 0.5 activation squared_relu norm_bias true",
    "qwen2": "num_kv_heads 32 qkv_bias true bias false head_dim none pattern *- vocab_size 151936",
    "gemma": "tied_head true num_kv_heads 16 head_dim 256 norm_epsilon 1e-06 activation geglu_tanh hidden_size 3072",
    "gemma2": "tied_head true head_dim 256 attention.window 4096 attention.scale 0.0625 attention.soft_cap 50.0 "
    "logit_soft_cap 30.0 embedding_multiplier 48.0 pattern W-*-W-*-W-*-W-*-W-*-W-*-W-*-W-*-W-*-W-*-W-*-W-*-W-*-",
    "gemma3_text": "tied_head true head_dim 256 rotary.base 1000000.0 window_rotary.base 10000.0 attention.window 4096 "
    "attention.soft_cap none vocab_size 262208",
    "granite": "tied_head false norm_epsilon 1e-06 attention.scale 1.0 logit_scale 1.0 rotary.base 10000.0",
    "olmo2": "tied_head false norm_epsilon 1e-05 qk_norm projection norm_placement output vocab_size 50304",
    "phi": "tied_head false head_bias true rotary.fraction 0.5 activation gelu_tanh pattern (*-)",
    "starcoder2": "tied_head true num_kv_heads 2 pattern *- bias true activation gelu_tanh initial_std 0.018042",
    "bloom": "tied_head true position alibi embedding_norm true activation gelu_tanh num_heads 8 hidden_size 64",
    "cohere": "tied_head true logit_scale 0.0625 rotary.base 500000.0 qk_norm false bias false pattern (*-)",
    "falcon": "tied_head true num_kv_heads 1 bias false norm_bias true pattern (*-) branch_norms false activation gelu",
    "gpt_neox": "tied_head false rotary.fraction 0.25 pattern (*-) branch_norms true activation gelu mlp_size 24576",
    "gptj": "tied_head false head_bias true rotary.fraction 0.25 activation gelu_tanh mlp_size none qkv_bias false",
    "opt": "tied_head true max_positions 2048 activation relu position learned mlp_size 3072",
    "phi3": "tied_head false num_kv_heads none rotary.fraction 1.0 norm_epsilon 1e-05 pattern *- vocab_size 32064",
    "mixtral": "num_kv_heads 8 rotary.base 1000000.0 norm_epsilon 1e-05 pattern *E moe.num_experts 8 moe.top_k 2 "
    "moe.scores topk_softmax mlp_size 14336",
    "qwen2_moe": "num_kv_heads 16 qkv_bias true bias false moe.num_experts 60 moe.top_k 4 moe.expert_size 1408 "
    "moe.shared_size 5632 moe.shared_gate true moe.renormalize false pattern *E num_layers 24 mlp_size 5632",
    "qwen3_moe": "num_kv_heads 4 qk_norm true head_dim none moe.num_experts 128 moe.top_k 8 moe.expert_size 768 "
    "moe.shared_size 0 moe.renormalize false pattern *E num_layers 24",
    "gpt_oss": "num_kv_heads 8 head_dim 64 rotary.base 150000.0 rotary.scaling.kind yarn rotary.scaling.factor 32.0 "
    "rotary.scaling.truncate false attention.window 128 attention.sinks true moe.num_experts 128 moe.top_k 4",
    "mamba": "tied_head true pattern m num_layers 32 mamba.state_size 16 mamba.dt_rank none mamba.expand 2.0 "
    "position none norm_epsilon 1e-05 initial_std 0.1",
    "mamba2": "tied_head false pattern M num_layers 64 mamba.num_heads 128 mamba.head_dim 64 mamba.num_groups 8 "
    "mamba.state_size 128 vocab_size 32768 hidden_size 4096",
    "nemotron_h": "tied_head false pattern ME*- num_layers 1 mamba.num_heads 128 num_kv_heads 8 head_dim 128 "
    "mlp_size 21504 activation squared_relu moe.num_experts 8 moe.expert_size 7688 moe.scores sigmoid",
    "bamba": "tied_head false pattern M- num_layers 32 mamba.num_heads 128 mamba.head_dim 64 mamba.num_groups 1 "
    "mamba.state_size 256 position none activation swiglu mlp_size 14336 norm_epsilon 1e-05",
    "jamba": "tied_head false pattern m-mEm-mE*-mEm-mE num_layers 4 num_kv_heads 8 mamba.state_size 16 "
    "mamba.dt_rank none mamba.inner_norms true moe.num_experts 16 moe.top_k 2 moe.renormalize false norm_epsilon 1e-06",
    "deepseek_v2": "tied_head false pattern LE num_layers 32 latent.q_lora_rank 1536 latent.kv_lora_rank 512 "
    "moe.top_k 6 moe.leading_dense 0 moe.num_experts 64 moe.expert_size 1407 moe.shared_size 2814 moe.groups 1",
    "deepseek_v3": "tied_head false pattern LE num_layers 61 latent.q_lora_rank 1536 latent.v_head_dim 128 moe.top_k 8 "
    "moe.leading_dense 3 moe.num_experts 256 moe.shared_size 2048 moe.scores sigmoid moe.groups 8 moe.top_groups 4 "
    "moe.group_score two_largest moe.renormalize true moe.scaling 2.5 bias false",
    "qwen3": "num_kv_heads 32 qk_norm true head_dim 128 pattern *- mlp_size 22016",
}
# what the class has no number for
GIVEN = {"deepseek_v2": {"num_experts_per_tok": 6}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_not_there_means_what_the_class_takes(family: str, tmp_path: Path):
    found: Any = model_of(tmp_path, {"model_type": family, **GIVEN.get(family, {})}).model_dump(mode="json")
    words = DEFAULTS[family].split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        at = found
        for part in name.split("."):
            at = at[part]
        assert format_value(at) == value, name


ROTARY = RotaryConfig(base=100.0)
MAMBA = MambaConfig(state_size=8, dt_rank=3)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mistral", {"sliding_window": None}, {"pattern": "*-", "num_layers": 2}),
        ("qwen2", {"layer_types": ...}, {"pattern": "*-W-W-", "num_layers": 1}),
        ("qwen2", {"layer_types": ..., "max_window_layers": 0}, {"pattern": "W-", "num_layers": 3}),
        ("qwen2", {"layer_types": ..., "use_sliding_window": False}, {"pattern": "*-", "num_layers": 3}),
        ("llama", {"attention_bias": True}, {"bias": True, "has_mlp_bias": False, "has_attention_output_bias": True}),
        ("llama", {"mlp_bias": True}, {"has_qkv_bias": False, "has_mlp_bias": True}),
        ("gpt_neox", {"use_parallel_residual": False}, {"pattern": "*-", "branch_norms": False}),
        ("gpt_neox", {"attention_bias": False}, {"has_qkv_bias": False, "has_mlp_bias": True}),
        ("gpt_neox", {"rope_parameters": ..., "rotary_pct": 1.0, "rotary_emb_base": 100}, {"rotary": ROTARY}),
        ("bloom", {"n_head": ..., "num_attention_heads": 3, "hidden_size": ..., "n_embed": 12}, {"head_size": 4}),
        ("falcon", {"num_ln_in_parallel_attn": 1}, {"branch_norms": False, "kv_heads": 2}),
        ("falcon", {"num_ln_in_parallel_attn": None}, {"branch_norms": True, "kv_heads": 2}),
        ("falcon_7b", {"multi_query": False, "parallel_attn": False}, {"pattern": "*-", "kv_heads": 4}),
        ("cohere", {"attention_bias": True}, {"has_qkv_bias": True, "has_mlp_bias": False, "norms_have_bias": False}),
        ("mixtral", {"sliding_window": 5}, {"pattern": "WE", "num_layers": 2}),
        ("qwen2_moe", {}, {"pattern": "*-*E", "num_layers": 2}),
        ("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0]}, {"pattern": "*E", "num_layers": 4}),
        ("qwen2_moe", {"mlp_only_layers": [3]}, {"pattern": "*-*E*-*-", "num_layers": 1}),
        ("qwen3_moe", {"num_local_experts": ..., "num_experts": 8}, {"pattern": "*E", "num_layers": 2}),
        ("mamba", {"time_step_rank": "auto"}, {"mamba": MAMBA.model_copy(update={"dt_rank": None})}),
        ("nemotron_h", {"layers_block_type": ["linear_attention"]}, {"pattern": "M", "num_kv_heads": None}),
        ("nemotron_h", {"head_dim": ..., "attention_head_dim": 10}, {"head_size": 10}),
        ("nemotron_h", {"time_step_min": 0.0}, {"pattern": "M-M*-"}),
        ("bamba", {"attn_layer_indices": None}, {"pattern": "M-", "num_layers": 3, "position": "none"}),
        ("bamba", {"mamba_d_head": "auto", "attention_bias": True}, {"has_qkv_bias": True, "has_mlp_bias": False}),
        ("jamba", {"num_experts": 1}, {"pattern": "m-*-", "num_layers": 2}),
        ("jamba", {"attn_layer_period": 3}, {"pattern": "m-*Em-mE", "num_layers": 1}),
        ("deepseek_v2", {"topk_method": "greedy"}, {"pattern": "LE", "num_layers": 3, "bias": False}),
        ("deepseek_v3", {"first_k_dense_replace": 3}, {"pattern": "L-", "num_layers": 3}),
        ("deepseek_v3", {"attention_bias": True}, {"bias": True, "has_mlp_bias": False, "expert_bias": False}),
        ("gpt2", {"n_inner": None}, {"mlp_size": None, "mlp_width": 128}),
        ("llama", {"num_key_value_heads": None, "head_dim": ...}, {"kv_heads": 4, "head_size": 8}),
    ],
    ids=str,
)
def test_what_is_null_or_left_out(name: str, changes: dict, expected: dict, tmp_path: Path):
    model = model_of(tmp_path, fixture_config(name, changes))
    assert {key: getattr(model, key) for key in expected} == expected


SU = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.5, 4.0]}
OLD: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 1000}),
    ("phi", {"partial_rotary_factor": 0.5, "rope_theta": 1000.0, "rope_scaling": None}),
    ("phi3", {"rope_theta": 1000.0, "rope_scaling": SU}),
    (
        "gemma3",
        {
            **{"layer_types": ..., "_sliding_window_pattern": ..., "sliding_window_pattern": 3, "rope_theta": 1000},
            **{"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 100.0},
        },
    ),
    ("gemma2", {"layer_types": ..., "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    ("mamba2", {"norm_before_gate": False, "rms_norm": True}),
    ("nemotron_h", {"layers_block_type": ..., "hybrid_override_pattern": "M-M*-", "num_hidden_layers": 5}),
    ("bamba", {"rope_theta": 10000.0, "rope_scaling": None, "attn_rotary_emb": 4}),
    ("deepseek_v2_lite", {"rope_theta": 10000, "moe_layer_freq": 1, "seq_aux": True, "scoring_func": "softmax"}),
    (
        "deepseek_v3",
        {
            **{"rope_theta": 1000, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1},
            "rope_scaling": {
                **{"type": "yarn", "factor": 8, "beta_fast": 1.5, "beta_slow": 0.25, "mscale": 1.0},
                **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 16},
            },
        },
    ),
]


@pytest.mark.parametrize(("name", "changes"), OLD, ids=[name for name, _ in OLD])
def test_files_of_transformers_4_say_the_same(name: str, changes: dict, tmp_path: Path):
    old = fixture_config(name, {"rope_parameters": ..., **changes})
    if name in ("gemma", "gemma2"):
        old["rope_theta"] = 10000.0
    assert model_of(tmp_path, old) == model_of(tmp_path, fixtures.load(name).config)


STRETCHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_type": "linear", "factor": 2.0}, {"kind": "linear", "factor": 2.0}),
    # as transformers before 4.43 says it
    ({"type": "linear", "factor": 2}, {"kind": "linear", "factor": 2}),
    ({"rope_type": "dynamic", "factor": 2.0}, {"kind": "dynamic", "factor": 2.0, "original_length": 64}),
    (
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "attention_factor": 1.5},
        {"kind": "yarn", "factor": 4.0, "original_length": 64, "truncate": False, "attention_factor": 1.5},
    ),
    (
        {
            **{"rope_type": "longrope", "original_max_position_embeddings": 16, "attention_factor": 1.25},
            **{"short_factor": [1, 1.5, 2, 3, 4, 5], "long_factor": [1, 2, 3, 4, 5, 6]},
        },
        {
            **{"kind": "longrope", "factor": 4.0, "original_length": 16, "attention_factor": 1.25},
            **{"short_factors": (1, 1.5, 2, 3, 4, 5), "long_factors": (1, 2, 3, 4, 5, 6)},
        },
    ),
]


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("rope", "expected"), STRETCHED, ids=[expected["kind"] for _, expected in STRETCHED])
def test_rules_of_stretching_are_read_and_said_again(rope: dict, expected: dict, key: str, tmp_path: Path):
    config = fixture_config("llama", {"rope_parameters": ..., key: rope, "rope_theta": 1e3})
    model = model_of(tmp_path, config)
    assert model.rotary == RotaryConfig(base=1e3, scaling=RotaryScaling(**expected))
    # another that computes otherwise would be refused
    said = config_of(model, began=config, positions=64)
    assert said.values["rope_scaling"]["rope_type"] == expected["kind"]


def test_a_tokenizer_is_carried_along(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert is_hub(tmp_path) and "data" not in hub_settings(tmp_path).tree
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hub_settings(tmp_path).tree["data"] == {"tokenizer": str(tmp_path / "tokenizer.json")}
    # a run stays a run, whatever else is there
    (tmp_path / "config.yaml").write_text("seed: 1")
    assert not is_hub(tmp_path)


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **values}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "clip"}, 'has model_type "clip": known here are bamba, bert'),
    ("llama", {"model_type": ...}, "has no model_type: known here are"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "only weights of LlamaForCausalLM are read"),
    ("llama", {"clip_qkv": 8.0, "logit_scale": 2}, "clip_qkv 8.0: that key of a llama is not known here (and 1 more)"),
    ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config {"bits": 4}: it is not known here'),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder true: only false is known here"),
    ("llama", {"mlp_bias": "yes"}, 'mlp_bias "yes": it must be true or false'),
    ("llama", {"hidden_act": "gelu_new"}, 'hidden_act "gelu_new": of a llama gelu, silu, or swish are known'),
    ("llama", {"max_position_embeddings": "x"}, 'max_position_embeddings "x": it must be a whole number up to'),
    ("llama", {"hidden_size": "32"}, "model.hidden_size: expected int >= 1, got '32' ("),
    ("llama", {"hidden_size": 0}, "config.json hidden_size)"),
    ("llama", {"vocab_size": 10**12}, "config.json vocab_size)"),
    ("llama", {"num_hidden_layers": 10**9}, "config.json num_hidden_layers)"),
    ("llama", {"rms_norm_eps": float("nan")}, "model.norm_epsilon: must be a finite number, got nan ("),
    ("llama", {"num_key_value_heads": 3}, "model.num_heads 4 is not a multiple of model.num_kv_heads 3"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters [1]: it must be an object or null"),
    ("llama", rope(rope_type="ntk", factor=2.0), 'rope_type "ntk" is not known here; known are default, llama3, yarn'),
    ("llama", rope(rope_type="linear"), "rope_parameters.factor null: with rope_type linear a number above 0"),
    (
        "llama",
        rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16),
        "rope_parameters.original_max_position_embeddings 16: with rope_type dynamic only max_position_embeddings 64",
    ),
    ("llama", rope(rope_type="longrope", short_factor=[1.0]), "long_factor null: with rope_type longrope a list"),
    ("llama", rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0]), "short_factors has 1 number, and"),
    ("llama", rope(rope_type="yarn", factor=4.0, truncate=0), "rope_parameters.truncate 0: it must be true or false"),
    ("llama", rope(rope_type="llama3", factor=8.0), "rope_parameters.low_freq_factor null: with rope_type llama3"),
    ("llama", rope(rope_type="yarn", factor="4"), 'rope_parameters.factor "4": with rope_type yarn a number above 0'),
    ("llama", rope(rope_type="yarn", factor=4.0, mscale="1"), 'rope_parameters.mscale "1": it must be a number'),
    ("llama", rope(mystery=3), "rope_parameters.mystery 3: with rope_type default that is not understood"),
    (
        "llama",
        {"rope_parameters": {"full_attention": {}}},
        "rope_parameters.full_attention {}: positions of a llama that",
    ),
    ("llama", {"rms_norm_eps": None}, "model.norm_epsilon: expected float > 0, got none ("),
    ("llama", {"vocab_size": None}, "model.vocab_size: expected int >= 1"),
    ("llama", {"tie_word_embeddings": None}, "model.tied_head: expected true | false, got none ("),
    ("llama", {"rope_parameters": None, "rope_theta": "1e4"}, "model.rotary.base: expected float > 1, got '1e4' ("),
    ("mistral", {"sliding_window": "x"}, 'sliding_window "x": it must be a whole number'),
    ("mistral", {"attention_bias": True}, "attention_bias true: only false is known here"),
    ("qwen2", {"layer_types": ["full_attention"]}, "it must be a list of 3 of full_attention and sliding_attention"),
    ("qwen2", {"use_sliding_window": False}, "sliding_attention needs use_sliding_window and a sliding_window"),
    ("qwen2", {"num_hidden_layers": 10**12, "layer_types": ...}, "it must be a whole number up to 65,536"),
    ("qwen3", {"attention_bias": True}, "attention_bias true: only false is known here"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before false: only true is known here"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16: only hidden_size is known here"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "only false is known here"),
    ("falcon", {"alibi": True}, "alibi true: only false is known here"),
    ("falcon", {"parallel_attn": False}, "parallel_attn false: with new_decoder_architecture true only true is known"),
    ("falcon_7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2: that is of new_decoder_architecture"),
    ("gptj", {"rotary_dim": 9}, "rotary_dim 9: it must be an even number from 2 to 8"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "it must be a list of 3 of full_attention and sliding"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0: it must be a whole number above 0"),
    ("qwen2_moe", {"mlp_only_layers": "0"}, 'mlp_only_layers "0": it must be a list of numbers of layers'),
    ("qwen2_moe", {"mlp_only_layers": [1, 3]}, "mlp_only_layers [1, 3]: no layer is left that has experts"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window true: only false is known here"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0: only 7.0 is known here"),
    ("mamba", {"use_bias": True}, "use_bias true: only false is known here"),
    ("mamba", {"hidden_act": "gelu"}, 'hidden_act "gelu": only "silu" is known here'),
    ("mamba", {"time_step_rank": "few"}, "model.mamba.dt_rank: expected int >= 1 | none, got 'few' ("),
    ("mamba", {"mixer_rms_eps": 1e-6}, "mixer_rms_eps 1e-06: that key of a mamba is not known here"),
    ("mamba2", {"use_conv_bias": False}, "use_conv_bias false: only true is known here"),
    ("mamba2", {"num_heads": 6}, "num_heads 6: with head_dim 8 it must make expand x hidden_size = 64 channels"),
    ("mamba2", {"time_step_limit": [0.5, 0.1]}, "[0.5, 0.1]: it must be a number of 0 or more, and a larger one"),
    ("mamba2", {"time_step_limit": 0.1}, "time_step_limit 0.1: it must be two numbers"),
    ("mamba2", {"time_step_min": "x"}, 'time_step_min "x": it must be a number of 0 or more'),
    ("nemotron_h", {"layers_block_type": ["mlp", "rnn"]}, "a list of linear_attention, full_attention, mlp, moe"),
    (
        "nemotron_h",
        {"layers_block_type": ..., "hybrid_override_pattern": "M|M"},
        "it must be a string of M, *, - and E",
    ),
    ("nemotron_h", {"num_hidden_layers": 4}, "num_hidden_layers 4: layers_block_type has 5 layers"),
    ("nemotron_h", {"time_step_limit": [0.0, 0.1]}, "the class does not read it and takes time_step_min"),
    ("nemotron_h", {"moe_latent_size": 8}, "moe_latent_size 8: it is not known here"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "of a nemotron_h gelu, gelu_new, gelu_pytorch_tanh, relu, or relu2 are"),
    ("nemotron_h", {"attention_head_dim": 8}, "attention_head_dim 8: head_dim says 12"),
    ("nemotron_h", {"layers_block_type": ["moe"], "mlp_bias": True}, "the MLP beside experts has a bias"),
    ("bamba", {"attn_layer_indices": [3]}, "it must be a list of numbers of layers, of which there are 3"),
    ("bamba", {"partial_rotary_factor": 1.0}, "partial_rotary_factor 1.0: only 0.5 is known here"),
    ("bamba", {"attn_rotary_emb": 8}, "attn_rotary_emb 8: the class does not read it, and rotates half of a head: 4"),
    ("bamba", {"mamba_proj_bias": True}, "mamba_proj_bias true: only false is known here"),
    ("jamba", {"expert_layer_offset": 2}, "expert_layer_offset 2: it must be below expert_layer_period, which is 2"),
    ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms false: only true is known here"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob true: only false is known here"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, '"noaux_tc": greedy and group_limited_greedy are known here'),
    ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok null: it must be a whole number"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05: only 1e-06 is known here, which the class takes"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave false: only true is known here"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2: all heads have keys of their own"),
    ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts 0: the class has an MLP beside its experts always"),
    ("deepseek_v3", rope(rope_type="yarn", factor=4.0, mscale_all_dim=1.0), "only both of mscale and mscale_all_dim"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only false is known here"),
    ("gpt2", {"activation_function": "silu"}, "of a gpt2 gelu, gelu_new, gelu_pytorch_tanh, or relu are known here"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_may_change_the_model_and_is_not_understood(name: str, changes: dict, said: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        model_of(tmp_path, fixture_config(name, changes))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[1]", "must be an object of keys, not [1]"),
        (b'{"model_type": "llama"', "is not JSON: Expecting"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' is there twice"),
        (b"\xff\xfe\x00", "is not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "is not JSON: maximum recursion depth"),
    ],
    ids=["list", "cut", "twice", "binary", "deep"],
)
def test_a_file_that_is_no_configuration(text: bytes, said: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match="config.json") as error:
        hub_settings(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)

"""Writes the fixtures beside this file: small random models of Hugging Face transformers, and their logits.

    pip install torch==2.14.1 transformers==5.24.0 safetensors==0.8.0
    python -m tests.hugging_face.make [NAME ...]

The suite reads the fixtures alone. Weights are small multiples of `STEP`, so that they are kept in a byte each, under
the names that files of the family have; norms, biases and buffers are as random as matrices.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from tests.hugging_face.fixtures import FOLDER, STEP

ROWS, LENGTH = 2, 12
BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
# latent attention with long sequences' rotations, one dense layer, shared experts
DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "beta_fast": 1.5,
    "beta_slow": 0.25,
    "original_max_position_embeddings": 16,
}
# a decoder with two norms by the mean, and with names of its own
GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 20, "n_inner": 48}
# decoders with norms by the mean, whose files keep what their family does not know
PLAIN: dict[str, Any] = {
    **{name: BASE[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")},
    "max_position_embeddings": 64,
    "intermediate_size": 40,
}
FALCON: dict[str, Any] = {**PLAIN, "alibi": False, "bias": False, "tie_word_embeddings": True}
GEMMA: dict[str, Any] = {
    "intermediate_size": 40,
    "head_dim": 12,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 10,
    "sliding_window": 5,
}
PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
# state-space layers
MAMBA: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "layer_norm_epsilon": 1e-5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # 3.1's rotations, so short that every part of the rule is there; heads wider than the stream
    "llama": (
        "llama",
        {
            "intermediate_size": 40,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama_biases": (
        "llama",
        {"intermediate_size": 40, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    # a window shorter than the sequence
    "mistral": ("mistral", {"intermediate_size": 40, "sliding_window": 5, "head_dim": None}),
    # a window in the last layers alone
    "qwen2": (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {**YARN, "rope_theta": 10000.0},
        },
    ),
    "qwen3": ("qwen3", {"intermediate_size": 40, "head_dim": 14, "tie_word_embeddings": True}),
    "nemotron": ("nemotron", {"intermediate_size": 40, "norm_eps": 1e-5}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", {**PLAIN, "layer_norm_eps": 1e-5, "rope_parameters": {**PARTIAL}}),
    "opt": (
        "opt",
        {
            **{name: value for name, value in PLAIN.items() if name != "intermediate_size"},
            "ffn_dim": 40,
            "word_embed_proj_dim": 32,
        },
    ),
    # so many heads that slopes are of two series
    "bloom": ("bloom", {"vocab_size": 40, "hidden_size": 36, "n_head": 6, "n_layer": 2}),
    "falcon": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40}),
    # one norm and one key/value head
    "falcon_7b": ("falcon", {**FALCON, "new_decoder_architecture": False, "multi_query": True, "ffn_hidden_size": 40}),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4, "tie_word_embeddings": False}),
    "phi": ("phi", {**PLAIN, "rope_parameters": {**PARTIAL}}),
    # sequences longer than those of its training before
    "phi3": (
        "phi3",
        {
            "intermediate_size": 40,
            "pad_token_id": 0,
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.5, 2.5, 4.0],
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "gemma": (
        "gemma",
        {name: GEMMA[name] for name in ("intermediate_size", "head_dim", "tie_word_embeddings")},
    ),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0}),
    # positions of layers with a window are others
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "olmo2": ("olmo2", {"intermediate_size": 40}),
    "cohere": (
        "cohere",
        {
            **PLAIN,
            "num_key_value_heads": 2,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.25,
            "use_qk_norm": True,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "granite",
        {
            "intermediate_size": 40,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "starcoder2": (
        "starcoder2",
        {**PLAIN, "num_key_value_heads": 2, "norm_epsilon": 1e-5, "sliding_window": None, "tie_word_embeddings": True},
    ),
    # attention and experts in every second layer
    "jamba": (
        "jamba",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 24,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 3,
            "use_mamba_kernels": False,
        },
    ),
    "mixtral": ("mixtral", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # layers in turn with and without experts
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "intermediate_size": 40,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 12,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    # its queries are of the stream
    "deepseek_v2_lite": (
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "head_dim": 8, "n_group": None, "topk_group": None},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            "q_lora_rank": 14,
            "topk_method": "group_limited_greedy",
            "head_dim": 8,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": 14,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    # attention in a window and of all in turn, with sinks; biases everywhere
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 12,
            "intermediate_size": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "mamba": ("mamba", {**MAMBA, "state_size": 8, "time_step_rank": 3, "use_mambapy": False}),
    "mamba2": (
        "mamba2",
        {**MAMBA, "num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2, "time_step_limit": (0.3, 1.5)},
    ),
    # the pattern of layers of the 8B hybrid in small; its attention knows no positions, its MLP no gate
    "nemotron_h": (
        "nemotron_h",
        {
            **MAMBA,
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "intermediate_size": 40,
            "mlp_hidden_act": "gelu",
            "mamba_num_heads": 6,
            "mamba_head_dim": 8,
            "ssm_state_size": 12,
            "n_groups": 3,
            "use_mamba_kernels": False,
            "time_step_min": 0.5,
        },
    ),
    # one with experts, as from its third generation on
    "nemotron_h_moe": (
        "nemotron_h",
        {
            **MAMBA,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 6,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 16,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": (
        "bamba",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 12,
        },
    ),
}
# by model, weights so large that some of what they make is cut off
LARGE = {"gpt_oss": "gate_up_proj"}

# a layer alone: the rest of its model is not here
DELTA_NET = "qwen3_next_delta_net"


def randomize(model: torch.nn.Module, large: str | None = None) -> None:
    """Every parameter and every buffer that a file holds, in multiples of `STEP`."""
    generator = np.random.default_rng(0)
    for name, array in model.state_dict().items():
        numbers = generator.standard_normal(tuple(array.shape))
        is_scale = name.endswith(("norm.weight", "norm_f.weight", "layernorm.weight", ".D"))
        # selection biases so large that some scores are below zero
        size = 0.8 if "correction_bias" in name else 0.2 if is_scale or "bias" in name else 0.3
        size = 1.0 if large is not None and name.endswith(large) else size
        scaled = numbers * size + is_scale
        whole = np.clip(np.rint(scaled / STEP), -127, 127)
        array.copy_(torch.from_numpy((whole * STEP).astype(np.float32)))


def record(name: str) -> None:
    """The fixture of one model."""
    model_type, changes = MODELS[name]
    settings = changes if "vocab_size" in changes else {**BASE, **changes}
    if model_type == "nemotron":
        # a file keeps what its family does not know
        settings.pop("rms_norm_eps")
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        randomize(model, LARGE.get(name))
        tokens = np.random.default_rng(1).integers(0, settings["vocab_size"], (ROWS, LENGTH))
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    weights = {f"weights/{key}": np.rint(value / STEP).astype(np.int8) for key, value in saved.items()}
    assert all(np.array_equal(weights[f"weights/{key}"] * np.float32(STEP), value) for key, value in saved.items())
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, config=json.dumps(written), tokens=tokens.astype(np.int32), logits=logits, **weights)
    print(f"{path.name}: {path.stat().st_size:,} bytes, logits up to {np.abs(logits).max():.1f}")


def record_delta_net() -> None:
    """What a gated delta net of Qwen3-Next makes of two sequences longer than a chunk."""
    module = transformers.models.qwen3_next.modeling_qwen3_next
    settings = {"hidden_size": 24, "layer_types": ["linear_attention"], "num_hidden_layers": 1, "rms_norm_eps": 1e-5}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4}
    widths = {"linear_key_head_dim": 8, "linear_value_head_dim": 10}
    config = transformers.AutoConfig.for_model("qwen3_next", **settings, **heads, **widths)
    layer = module.Qwen3NextGatedDeltaNet(config, 0).float().eval()
    with torch.no_grad():
        randomize(layer)
        x = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, 72, 24)).astype(np.float32))
        y = layer(x).numpy()
        saved = {key: value.numpy() for key, value in layer.state_dict().items()}
    weights = {f"weights/{key}": np.rint(value / STEP).astype(np.int8) for key, value in saved.items()}
    path = FOLDER / "layers" / f"{DELTA_NET}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, config=json.dumps({**heads, **widths}), x=x.numpy(), y=y, **weights)
    print(f"{path.name}: {path.stat().st_size:,} bytes, outputs up to {np.abs(y).max():.1f}")


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in sys.argv[1:] or [*MODELS, DELTA_NET]:
        record_delta_net() if name == DELTA_NET else record(name)

"""BLOOM, whose scores fall with the distance, and which has a norm right after the embedding."""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.gpt_neox import MLP, attention_by_head
from jaxtron.weights.families.llama import norm_rows
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.table import Tensor, TensorTable

# ours, by names of old files and of new ones, and the class's
SIZES = (("hidden_size", "n_embed", "hidden_size", 64), ("num_heads", "num_attention_heads", "n_head", 8))


def _read_sizes(file: ConfigFile) -> None:
    for ours, old, new, default in SIZES:
        given, usual = file.get(old), file.get(new, default)
        file.set(ours, usual if given is None else given, new if given is None else old)


def _write_sizes(model: ModelConfig) -> dict[str, Any]:
    return {new: getattr(model, ours) for ours, _, new, _ in SIZES}


BLOOM = HubFamily(
    architecture="BloomForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 250880),
        Key("n_layer", "num_layers", 2),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", True),
    ),
    tensors=TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "transformer.word_embeddings.weight", "V E"),
            *norm_rows("embedding_norm", "transformer.word_embeddings_layernorm"),
            *norm_rows("final_norm", "transformer.ln_f"),
            Tensor("head.table", "V E", "lm_head.weight", "V E"),
        ),
        branches={
            "*": (*norm_rows("norm", "input_layernorm"), *attention_by_head("self_attention")),
            "-": (*norm_rows("norm", "post_attention_layernorm"), *MLP),
        },
        layer="transformer.h.{}.",
        base="transformer.",
    ),
    constants={
        "norm": "layer_norm",
        "bias": True,
        "position": "alibi",
        "embedding_norm": True,
        "activation": "gelu_tanh",
    },
    only={"apply_residual_connection_post_layernorm": False, "n_inner": None},
    further=(Rule(_read_sizes, _write_sizes),),
    without_effect="attention_softmax_in_fp32 bias_dropout_fusion hidden_dropout masked_softmax_fusion offset_alibi "
    "seq_length skip_bias_add skip_bias_add_qkv slow_but_exact unk_token_id",
    # it has none
    positions=None,
)

"""Falcon: queries, keys and values by the groups that share a key, and attention beside the MLP, on one norm or two."""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.gpt_neox import MLP, PARALLEL
from jaxtron.weights.families.llama import PLAIN, linear_rows, norm_rows
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.orders import by_group
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor, TensorTable

NEW, NORMS, SIDE_BY_SIDE = "new_decoder_architecture", "num_ln_in_parallel_attn", "parallel_attn"
QKV = "self_attention.query_key_value"
PROJECTIONS = {"query": "H", "key": "K", "value": "K"}


def _read_architecture(file: ConfigFile) -> None:
    """That of the 7B, in which one key serves all heads, and the new one of groups."""
    is_new, norms = file.flag(NEW, False), file.get(NORMS)
    is_parallel, is_shared = file.flag(SIDE_BY_SIDE, True), file.flag("multi_query", True)
    keys = file.get("num_kv_heads")
    if norms not in (None, 1, 2):
        file.refuse(NORMS, "it must be 1, 2 or null")
    if is_new and not is_parallel:
        file.refuse(SIDE_BY_SIDE, f"with {NEW} true only true is known here")
    if norms == 2 and not is_new:
        file.refuse(NORMS, f"that is of {NEW} true")
    if is_parallel:
        file.set("pattern", PARALLEL, SIDE_BY_SIDE)
    if is_new:
        file.set("branch_norms", norms != 1, NORMS)
    if is_new and keys is not None:
        file.set("num_kv_heads", keys, "num_kv_heads")
    elif not is_new and is_shared:
        file.set("num_kv_heads", 1, "multi_query")


def _write_architecture(model: ModelConfig) -> dict[str, Any]:
    is_parallel = all(len(branch) > 1 for branch in model.layout.layers)
    if is_parallel and (model.branch_norms or model.kv_heads > 1):
        norms = 2 if model.branch_norms else 1
        return {NEW: True, SIDE_BY_SIDE: True, NORMS: norms, "num_kv_heads": model.kv_heads}
    return {NEW: False, SIDE_BY_SIDE: is_parallel, "multi_query": model.kv_heads == 1}


FALCON = HubFamily(
    architecture="FalconForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 65024),
        Key("hidden_size", "hidden_size", 4544),
        Key("ffn_hidden_size", "mlp_size"),
        Key("num_hidden_layers", "num_layers", 32),
        Key("num_attention_heads", "num_heads", 71),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", True),
        Key("activation", "activation", "gelu", PLAIN),
        Key("bias", "bias", False),
    ),
    tensors=TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "transformer.word_embeddings.weight", "V E"),
            *norm_rows("final_norm", "transformer.ln_f"),
            Tensor("head.table", "V E", "lm_head.weight", "V E"),
        ),
        branches={
            "*": (
                *norm_rows("attention_norm", "ln_attn"),
                *norm_rows("norm", "input_layernorm"),
                *(
                    Tensor(f"attention.{one}.kernel", f"E {heads} D", f"{QKV}.weight", f"{heads}D E", by_group)
                    for one, heads in PROJECTIONS.items()
                ),
                *(
                    Tensor(f"attention.{one}.bias", f"{heads} D", f"{QKV}.bias", f"{heads}D", by_group)
                    for one, heads in PROJECTIONS.items()
                ),
                *linear_rows("attention.output", "self_attention.dense", ("HD", "E")),
            ),
            "-": (*norm_rows("mlp_norm", "ln_mlp"), *norm_rows("norm", "post_attention_layernorm"), *MLP),
        },
        layer="transformer.h.{}.",
        base="transformer.",
        ignored=("rotary_emb.inv_freq",),
    ),
    constants={"norm": "layer_norm", "norm_bias": True},
    only={"alibi": False, "apply_residual_connection_post_layernorm": False},
    further=(Rule(_read_architecture, _write_architecture), rotary()),
    # the class has one width, by the other name
    without_effect="auto_map hidden_dropout intermediate_size",
)

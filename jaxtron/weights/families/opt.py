"""OPT, whose learned positions begin with two rows of no token."""

from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.llama import PLAIN, linear_rows, norm_rows
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.orders import after
from jaxtron.weights.table import Tensor, TensorTable


def _check_width(file: ConfigFile) -> None:
    """Of the embedding: that of a small one is another (OPT-350m)."""
    if file.get("word_embed_proj_dim") not in (None, file.get("hidden_size", 768)):
        file.refuse("word_embed_proj_dim", "only hidden_size is known here")


OPT = HubFamily(
    architecture="OPTForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 50272),
        Key("hidden_size", "hidden_size", 768),
        Key("ffn_dim", "mlp_size", 3072),
        Key("num_hidden_layers", "num_layers", 12),
        Key("num_attention_heads", "num_heads", 12),
        Key("max_position_embeddings", "max_positions", 2048),
        Key("init_std", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", True),
        Key("activation_function", "activation", "relu", PLAIN),
        Key("enable_bias", "bias", True),
    ),
    tensors=TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "model.decoder.embed_tokens.weight", "V E"),
            Tensor("embedding.positions", "P E", "model.decoder.embed_positions.weight", "P E", after(2)),
            *norm_rows("final_norm", "model.decoder.final_layer_norm"),
            Tensor("head.table", "V E", "lm_head.weight", "V E"),
        ),
        branches={
            "*": (
                *norm_rows("norm", "self_attn_layer_norm"),
                *linear_rows("attention.query", "self_attn.q_proj", ("E", "HD")),
                *linear_rows("attention.key", "self_attn.k_proj", ("E", "KD")),
                *linear_rows("attention.value", "self_attn.v_proj", ("E", "KD")),
                *linear_rows("attention.output", "self_attn.out_proj", ("HD", "E")),
            ),
            "-": (
                *norm_rows("norm", "final_layer_norm"),
                *linear_rows("mlp.up", "fc1", ("E", "F")),
                *linear_rows("mlp.down", "fc2", ("F", "E")),
            ),
        },
        layer="model.decoder.layers.{}.",
    ),
    constants={"norm": "layer_norm", "norm_bias": True, "norm_epsilon": 1e-5, "position": "learned"},
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
    further=(Rule(_check_width, lambda model: {"word_embed_proj_dim": model.hidden_size}),),
    without_effect="activation_dropout dropout layerdrop",
    # a key of a setting
    positions=None,
)

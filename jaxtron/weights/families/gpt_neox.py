"""GPT-NeoX and Pythia: attention and MLP side by side, each on a norm of its own, or one after the other.

GPT-J, of the same makers: both on one norm, and rotated pairs are neighbours.
"""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.llama import PLAIN, linear_rows, norm_rows
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.orders import neighbours
from jaxtron.weights.rotary import FRACTION, THETA, rotary
from jaxtron.weights.table import Tensor, TensorTable

PARALLEL = "(*-)"
KERNELS, BIASES = (tuple(f"attention.{one}.{what}" for one in ("query", "key", "value")) for what in ("kernel", "bias"))


def attention_by_head(theirs: str) -> tuple[Tensor, ...]:
    """Of each head queries, key and value; and back."""
    return (
        Tensor(KERNELS, "E H D", f"{theirs}.query_key_value.weight", "HQD E"),
        Tensor(BIASES, "H D", f"{theirs}.query_key_value.bias", "HQD"),
        *linear_rows("attention.output", f"{theirs}.dense", ("HD", "E")),
    )


# as BLOOM and Falcon have it too
MLP = (
    *linear_rows("mlp.up", "mlp.dense_h_to_4h", ("E", "F")),
    *linear_rows("mlp.down", "mlp.dense_4h_to_h", ("F", "E")),
)


def _read_residual(file: ConfigFile) -> None:
    if file.flag("use_parallel_residual", True):
        file.set("pattern", PARALLEL, "use_parallel_residual")
        file.set("branch_norms", True, "use_parallel_residual")
    if not file.flag("attention_bias", True):
        for setting in ("qkv_bias", "attention_output_bias"):
            file.set(setting, False, "attention_bias")


def _write_residual(model: ModelConfig) -> dict[str, Any]:
    return {"use_parallel_residual": model.branch_norms, "attention_bias": model.has_qkv_bias}


GPT_NEOX = HubFamily(
    architecture="GPTNeoXForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 50432),
        Key("hidden_size", "hidden_size", 6144),
        Key("intermediate_size", "mlp_size", 24576),
        Key("num_hidden_layers", "num_layers", 44),
        Key("num_attention_heads", "num_heads", 64),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", False),
        Key("layer_norm_eps", "norm_epsilon", 1e-5),
        Key("hidden_act", "activation", "gelu", PLAIN),
    ),
    tensors=TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "gpt_neox.embed_in.weight", "V E"),
            *norm_rows("final_norm", "gpt_neox.final_layer_norm"),
            Tensor("head.table", "V E", "embed_out.weight", "V E"),
        ),
        branches={
            "*": (
                *norm_rows("attention_norm", "input_layernorm"),
                *norm_rows("norm", "input_layernorm"),
                *attention_by_head("attention"),
            ),
            "-": (
                *norm_rows("mlp_norm", "post_attention_layernorm"),
                *norm_rows("norm", "post_attention_layernorm"),
                *MLP,
            ),
        },
        layer="gpt_neox.layers.{}.",
        base="gpt_neox.",
        head="embed_out.weight",
        ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    ),
    constants={"norm": "layer_norm", "bias": True},
    further=(
        Rule(_read_residual, _write_residual),
        rotary(fraction=0.25, names={THETA: "rotary_emb_base", FRACTION: "rotary_pct"}),
    ),
    without_effect="classifier_dropout hidden_dropout",
)


def _read_rotated(file: ConfigFile) -> None:
    """How many dimensions of a head are."""
    heads = max(file.whole("n_head", 16), 1)
    size, rotated = file.whole("n_embd", 4096) // heads, file.whole("rotary_dim", 64)
    if rotated % 2 or not 2 <= rotated <= size:
        file.refuse("rotary_dim", f"it must be an even number from 2 to {size}")
    fraction = rotated / size
    # where a division rounds down, the same number of them
    file.set("rotary.fraction", fraction if int(size * fraction) == rotated else (rotated + 0.5) / size, "rotary_dim")
    file.set("position", "rotary", "model_type")


def _write_rotated(model: ModelConfig) -> dict[str, Any]:
    return {"rotary_dim": model.rotary.dimensions(model.head_size)}


GPTJ = HubFamily(
    architecture="GPTJForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 50400),
        Key("n_embd", "hidden_size", 4096),
        Key("n_inner", "mlp_size"),
        Key("n_layer", "num_layers", 28),
        Key("n_head", "num_heads", 16),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", False),
        Key("activation_function", "activation", "gelu_new", PLAIN),
    ),
    tensors=TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "transformer.wte.weight", "V E"),
            *norm_rows("final_norm", "transformer.ln_f"),
            Tensor("head.table", "V E", "lm_head.weight", "V E"),
            Tensor("head_bias", "V", "lm_head.bias", "V"),
        ),
        branches={
            "*": (
                *norm_rows("norm", "ln_1"),
                Tensor("attention.query.kernel", "E H D", "attn.q_proj.weight", "HD E", neighbours),
                Tensor("attention.key.kernel", "E K D", "attn.k_proj.weight", "KD E", neighbours),
                Tensor("attention.value.kernel", "E K D", "attn.v_proj.weight", "KD E"),
                Tensor("attention.output.kernel", "H D E", "attn.out_proj.weight", "E HD"),
            ),
            "-": (
                *linear_rows("mlp.up", "mlp.fc_in", ("E", "F")),
                *linear_rows("mlp.down", "mlp.fc_out", ("F", "E")),
            ),
        },
        layer="transformer.h.{}.",
        base="transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    constants={
        "norm": "layer_norm",
        "bias": True,
        "qkv_bias": False,
        "attention_output_bias": False,
        "head_bias": True,
        "pattern": PARALLEL,
    },
    only={"scale_attn_weights": True, "rotary": True},
    further=(Rule(_read_rotated, _write_rotated),),
    without_effect="attn_pdrop embd_pdrop gradient_checkpointing n_ctx n_positions resid_pdrop summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
    positions="n_positions",
)

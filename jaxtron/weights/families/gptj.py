"""GPT-J, whose rotated pairs are neighbours."""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.gpt_neox import PARALLEL, linear_rows
from jaxtron.weights.families.llama import PLAIN, norm_rows
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.orders import neighbours
from jaxtron.weights.table import Tensor, TensorTable


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

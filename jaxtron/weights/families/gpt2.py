"""GPT-2, whose matrices lie as they do here, queries, keys and values in one."""

from jaxtron.weights.family import HubFamily, Key
from jaxtron.weights.table import Tensor, TensorTable


def _linear(ours: str, inputs: str, outputs: str, theirs: str) -> tuple[Tensor, Tensor]:
    """A matrix and its bias."""
    dims, kept = " ".join(inputs + outputs), " ".join(outputs)
    return (
        Tensor(f"{ours}.kernel", dims, f"{theirs}.weight", f"{inputs} {outputs}"),
        Tensor(f"{ours}.bias", kept, f"{theirs}.bias", outputs),
    )


def _norm(ours: str, theirs: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"{ours}.scale", "E", f"{theirs}.weight", "E"), Tensor(f"{ours}.bias", "E", f"{theirs}.bias", "E")


PROJECTIONS = ("query", "key", "value")
TENSORS = TensorTable(
    outer=(
        Tensor("embedding.table", "V E", "transformer.wte.weight", "V E"),
        Tensor("embedding.positions", "P E", "transformer.wpe.weight", "P E"),
        *_norm("final_norm", "transformer.ln_f"),
        Tensor("head.table", "V E", "lm_head.weight", "V E"),
    ),
    branches={
        "*": (
            *_norm("norm", "ln_1"),
            Tensor(tuple(f"attention.{one}.kernel" for one in PROJECTIONS), "E H D", "attn.c_attn.weight", "E QHD"),
            Tensor(tuple(f"attention.{one}.bias" for one in PROJECTIONS), "H D", "attn.c_attn.bias", "QHD"),
            *_linear("attention.output", "HD", "E", "attn.c_proj"),
        ),
        "-": (
            *_norm("norm", "ln_2"),
            *_linear("mlp.up", "E", "F", "mlp.c_fc"),
            *_linear("mlp.down", "F", "E", "mlp.c_proj"),
        ),
    },
    layer="transformer.h.{}.",
    base="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)
GPT2 = HubFamily(
    architecture="GPT2LMHeadModel",
    keys=(
        Key("vocab_size", "vocab_size", 50257),
        Key("n_embd", "hidden_size", 768),
        Key("n_inner", "mlp_size"),
        Key("n_layer", "num_layers", 12),
        Key("n_head", "num_heads", 12),
        Key("n_positions", "max_positions", 1024),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", True),
        Key(
            "activation_function",
            "activation",
            "gelu_new",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
        ),
    ),
    tensors=TENSORS,
    constants={"norm": "layer_norm", "bias": True, "position": "learned"},
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    without_effect="attn_pdrop embd_pdrop resid_pdrop n_ctx reorder_and_upcast_attn summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
    # another name of the key of a setting there
    positions=None,
)

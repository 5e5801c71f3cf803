"""The table of a GPT of Megatron-LM: its tensors, by the names that `names.py` gives them, and the parameters here."""

from jaxtron.weights.table import Tensor, TensorTable


def _norm(ours: str, theirs: str, dims: str = "E") -> tuple[Tensor, Tensor]:
    return Tensor(f"{ours}.scale", dims, f"{theirs}.weight", dims), Tensor(f"{ours}.bias", dims, f"{theirs}.bias", dims)


def _linear(ours: str, dims: tuple[str, str], theirs: str, stored: str) -> tuple[Tensor, Tensor]:
    """A matrix and its bias, by the dimensions that it has before and behind."""
    inputs, outputs = dims
    kernel = Tensor(f"{ours}.kernel", f"{inputs} {outputs}", f"{theirs}.weight", stored)
    return kernel, Tensor(f"{ours}.bias", outputs, f"{theirs}.bias", stored.split()[0])


# of linear_qkv, whose rows are by group, each part by itself
QKV = "self_attention.linear_qkv"
ATTENTION = (
    *_norm("norm", "input_layernorm"),
    *_linear("attention.query", ("E", "H D"), f"{QKV}.query", "HD E"),
    *_linear("attention.key", ("E", "K D"), f"{QKV}.key", "KD E"),
    *_linear("attention.value", ("E", "K D"), f"{QKV}.value", "KD E"),
    *_norm("attention.query_norm", "self_attention.q_layernorm", "D"),
    *_norm("attention.key_norm", "self_attention.k_layernorm", "D"),
    Tensor("attention.sinks", "H", "self_attention.core_attention.softmax_offset", "H"),
    *_linear("attention.output", ("H D", "E"), "self_attention.linear_proj", "E HD"),
)


def _mlp(ours: str, theirs: str, *, is_gated: bool) -> tuple[Tensor, ...]:
    """A gate lies before what it opens."""
    up = _linear(f"{ours}.up", ("E", "G F"), f"{theirs}.linear_fc1", "GF E") if is_gated else ()
    return (
        *(up or _linear(f"{ours}.up", ("E", "F"), f"{theirs}.linear_fc1", "F E")),
        *_linear(f"{ours}.down", ("F", "E"), f"{theirs}.linear_fc2", "E F"),
    )


def megatron_table(*, is_gated: bool) -> TensorTable:
    """That of models whose MLPs have gates, or have none."""
    norm = _norm("norm", "pre_mlp_layernorm")
    experts = (
        *norm,
        Tensor("moe.router.kernel", "E N", "mlp.router.weight", "N E"),
        Tensor("moe.router.bias", "N", "mlp.router.expert_bias", "N"),
        # there is one linear half alone where there is no gate
        Tensor("moe.up", "N E G F", "mlp.experts.linear_fc1.weight", "N GF E"),
        Tensor("moe.down", "N F E", "mlp.experts.linear_fc2.weight", "N E F"),
        *_mlp("moe.shared", "mlp.shared_experts", is_gated=is_gated),
        Tensor("moe.shared_gate", "E", "mlp.shared_experts.gate_weight", "E"),
    )
    return TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "embedding.word_embeddings.weight", "V E"),
            Tensor("embedding.positions", "P E", "embedding.position_embeddings.weight", "P E"),
            *_norm("final_norm", "decoder.final_layernorm"),
            Tensor("head.table", "V E", "output_layer.weight", "V E"),
        ),
        branches={
            "*": ATTENTION,
            "W": ATTENTION,
            "-": (*norm, *_mlp("mlp", "mlp", is_gated=is_gated)),
            "E": experts,
        },
        layer="decoder.layers.{}.",
        base="",
        head="output_layer.weight",
    )

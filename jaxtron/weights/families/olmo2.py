"""OLMo 2, whose norms are on what branches make, and over the whole width of queries and keys."""

from dataclasses import replace

from jaxtron.weights.families.llama import ATTENTION, GATED_MLP, RMS, RMS_KEYS, TENSORS, common_keys, norm_rows
from jaxtron.weights.family import HubFamily
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor

QK_NORMS = ("attention.query_norm.scale", "attention.key_norm.scale")
OLMO2 = HubFamily(
    architecture="Olmo2ForCausalLM",
    keys=(
        *common_keys(vocab=50304, hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=None),
        *(replace(key, default=1e-5) if key.ours == "norm_epsilon" else key for key in RMS_KEYS),
    ),
    tensors=replace(
        TENSORS,
        branches={
            "*": (
                *norm_rows("attention_output_norm", "post_attention_layernorm"),
                Tensor(QK_NORMS[0], "H D", "self_attn.q_norm.weight", "HD"),
                Tensor(QK_NORMS[1], "K D", "self_attn.k_norm.weight", "KD"),
                *(row for row in ATTENTION if row.parameters[0] not in QK_NORMS),
            ),
            "-": (*norm_rows("mlp_output_norm", "post_feedforward_layernorm"), *GATED_MLP),
        },
    ),
    constants={**RMS, "norm_placement": "output", "qk_norm": "projection"},
    only={"attention_bias": False},
    further=(rotary(),),
)

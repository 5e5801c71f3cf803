"""Phi 1, 1.5 and 2: attention and MLP side by side on one norm, and a head with a bias.

Phi-3 and 4 are Llamas with queries, keys and values in one tensor, and gate and up in another.
"""

from dataclasses import replace

from jaxtron.weights.families.llama import (
    ATTENTION,
    DOWN,
    PLAIN,
    RMS,
    RMS_KEYS,
    TENSORS,
    common_keys,
    linear_rows,
    norm_rows,
    projection,
    read_window,
    write_window,
)
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.orders import side_by_side
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor, TensorTable

PHI = HubFamily(
    architecture="PhiForCausalLM",
    keys=(
        *common_keys(vocab=51200, hidden=2048, mlp=8192, layers=24, heads=32, kv_heads=None),
        Key("layer_norm_eps", "norm_epsilon", 1e-5),
        Key("hidden_act", "activation", "gelu_new", PLAIN),
    ),
    tensors=TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "model.embed_tokens.weight", "V E"),
            *norm_rows("final_norm", "model.final_layernorm"),
            Tensor("head.table", "V E", "lm_head.weight", "V E"),
            Tensor("head_bias", "V", "lm_head.bias", "V"),
        ),
        branches={
            "*": (
                *norm_rows("norm", "input_layernorm"),
                *projection("query", "q_proj", "H"),
                *projection("key", "k_proj", "K"),
                *projection("value", "v_proj", "K"),
                *linear_rows("attention.output", "self_attn.dense", ("HD", "E")),
            ),
            "-": (
                *linear_rows("mlp.up", "mlp.fc1", ("E", "F")),
                *linear_rows("mlp.down", "mlp.fc2", ("F", "E")),
            ),
        },
        layer="model.layers.{}.",
        ignored=("rotary_emb.inv_freq",),
    ),
    constants={"norm": "layer_norm", "bias": True, "pattern": "(*-)", "head_bias": True},
    only={"qk_layernorm": False},
    further=(rotary(fraction=0.5),),
    without_effect="embd_pdrop resid_pdrop",
)

QKV = "self_attn.qkv_proj.weight"
PROJECTIONS = {"attention.query.kernel": "H", "attention.key.kernel": "K", "attention.value.kernel": "K"}
ROWS = (
    *(Tensor(ours, f"E {heads} D", QKV, f"{heads}D E", side_by_side) for ours, heads in PROJECTIONS.items()),
    *(row for row in ATTENTION if row.parameters[0] not in PROJECTIONS),
)
PHI3 = HubFamily(
    architecture="Phi3ForCausalLM",
    keys=(
        *common_keys(vocab=32064, hidden=3072, mlp=8192, layers=32, heads=32, kv_heads=None),
        *(replace(key, default=1e-5) if key.ours == "norm_epsilon" else key for key in RMS_KEYS),
    ),
    tensors=replace(
        TENSORS,
        branches={
            "*": ROWS,
            "W": ROWS,
            "-": (*DOWN, Tensor("mlp.up.kernel", "E G F", "mlp.gate_up_proj.weight", "GF E")),
        },
    ),
    constants=RMS,
    only={"attention_bias": False, "mlp_bias": False},
    further=(
        Rule(lambda file: read_window(file, None), write_window),
        rotary(fraction=1.0, positions=4096, original_outside=4096),
    ),
    without_effect="auto_map embd_pdrop resid_pdrop",
)

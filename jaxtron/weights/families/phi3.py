"""Phi-3 and 4, with queries, keys and values in one tensor, and gate and up in another."""

from dataclasses import replace

from jaxtron.weights.families.llama import (
    ATTENTION,
    DOWN,
    RMS,
    RMS_KEYS,
    TENSORS,
    common_keys,
    read_window,
    write_window,
)
from jaxtron.weights.families.rotary import rotary
from jaxtron.weights.family import HubFamily, Rule
from jaxtron.weights.orders import side_by_side
from jaxtron.weights.table import Tensor

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

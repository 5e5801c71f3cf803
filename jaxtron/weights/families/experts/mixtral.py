"""Mixtral, whose files have each expert's matrices by themselves, or those of a layer in one."""

from dataclasses import replace
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import expert_width
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.llama import ATTENTION, RMS, RMS_KEYS, TENSORS, common_keys, norm_rows, write_window
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor

# a name that only files of all experts in one have
STACKED = ".mlp.experts.gate_up_proj"
NORM = norm_rows("norm", "post_attention_layernorm")


def expert_rows(own: str, names: tuple[str, str, str], router: str = "gate") -> tuple[Tensor, ...]:
    """Router and experts, by the names of gate, up and down, and of the router."""
    gate, up, down = (f"{own}.experts.{{}}.{name}.weight" for name in names)
    return (
        Tensor("moe.router.kernel", "E N", f"{own}.{router}.weight", "N E"),
        Tensor("moe.up", "N E G F", (gate, up), "F E"),
        Tensor("moe.down", "N F E", down, "E F"),
    )


def stacked_rows(own: str, router: str = "gate") -> tuple[Tensor, ...]:
    """The same as transformers 5 has them in memory, all experts in one."""
    return (
        Tensor("moe.router.kernel", "E N", f"{own}.{router}.weight", "N E"),
        Tensor("moe.up", "N E G F", f"{own}.experts.gate_up_proj", "N GF E"),
        Tensor("moe.down", "N F E", f"{own}.experts.down_proj", "N E F"),
    )


STACKED_ROWS = stacked_rows("mlp")


def _read_pattern(file: ConfigFile) -> None:
    window = file.get("sliding_window")
    file.set("pattern", "*E" if window is None else "WE", "sliding_window")
    if window is not None:
        file.set("attention.window", file.whole("sliding_window", 0), "sliding_window")


def _write_pattern(model: ModelConfig) -> dict[str, Any]:
    return {**write_window(model), "intermediate_size": expert_width(model)}


WITHOUT_EFFECT = "output_router_logits router_aux_loss_coef"
MIXTRAL = HubFamily(
    architecture="MixtralForCausalLM",
    keys=(
        *common_keys(vocab=32000, hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8),
        *(replace(key, default=1e-5) if key.ours == "norm_epsilon" else key for key in RMS_KEYS),
        Key("num_local_experts", "moe.num_experts", 8),
        Key("num_experts_per_tok", "moe.top_k", 2),
    ),
    tensors=replace(
        TENSORS,
        branches={
            **dict.fromkeys("*W", ATTENTION),
            "E": (*NORM, *expert_rows("block_sparse_moe", ("w1", "w3", "w2"))),
        },
    ),
    others={STACKED: replace(TENSORS, branches={**dict.fromkeys("*W", ATTENTION), "E": (*NORM, *STACKED_ROWS)})},
    constants={**RMS, "moe.scores": "topk_softmax"},
    only={"attention_bias": False},
    further=(Rule(_read_pattern, _write_pattern), rotary(base=1e6, positions=131072)),
    without_effect=f"{WITHOUT_EFFECT} router_jitter_noise",
)

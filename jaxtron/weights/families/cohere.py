"""Cohere's Command R: attention beside a gated MLP on one LayerNorm without a bias; rotated pairs are neighbours."""

from dataclasses import replace
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.gpt_neox import PARALLEL
from jaxtron.weights.families.llama import ATTENTION, GATED, GATED_MLP, TENSORS, common_keys
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.orders import neighbours, neighbours_of_norm
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor

ROTATED = tuple(f"attention.{one}.{what}" for one in ("query", "key") for what in ("kernel", "bias"))
QK_NORMS = ("attention.query_norm.scale", "attention.key_norm.scale")


def _read_options(file: ConfigFile) -> None:
    if file.flag("use_qk_norm", False):
        file.set("qk_norm", "each_head", "use_qk_norm")
    if file.flag("attention_bias", False):
        for setting in ("qkv_bias", "attention_output_bias"):
            file.set(setting, True, "attention_bias")


def _write_options(model: ModelConfig) -> dict[str, Any]:
    return {"use_qk_norm": model.qk_norm == "each_head", "attention_bias": model.has_qkv_bias}


COHERE = HubFamily(
    architecture="CohereForCausalLM",
    keys=(
        *common_keys(vocab=256000, hidden=8192, mlp=22528, layers=40, heads=64, kv_heads=None, is_tied=True),
        Key("layer_norm_eps", "norm_epsilon", 1e-5),
        Key("hidden_act", "activation", "silu", GATED),
        Key("logit_scale", "logit_scale", 0.0625),
    ),
    tensors=replace(
        TENSORS,
        branches={
            "*": (
                *(replace(row, rows=neighbours) for row in ATTENTION if row.parameters[0] in ROTATED),
                Tensor(QK_NORMS[0], "H D", "self_attn.q_norm.weight", "H D", neighbours_of_norm),
                Tensor(QK_NORMS[1], "K D", "self_attn.k_norm.weight", "K D", neighbours_of_norm),
                *(row for row in ATTENTION if row.parameters[0] not in (*ROTATED, *QK_NORMS)),
            ),
            # the one norm is attention's
            "-": tuple(row for row in GATED_MLP if not row.parameters[0].startswith("norm.")),
        },
    ),
    constants={"norm": "layer_norm", "bias": False, "pattern": PARALLEL},
    further=(Rule(_read_options, _write_options), rotary(base=500000.0, positions=8192)),
)

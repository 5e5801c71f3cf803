"""gpt-oss: experts with biases, whose gates and what they gate take turns; windows in every second layer; sinks."""

from dataclasses import replace
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import expert_width
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.experts.mixtral import NORM, WITHOUT_EFFECT
from jaxtron.weights.families.gemma import write_kinds
from jaxtron.weights.families.llama import (
    ATTENTION,
    FULL,
    MOST_LAYERS,
    SLIDING,
    TENSORS,
    common_keys,
    kinds_of_layers,
    set_kinds,
)
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import FRACTION, NEW, OLD, ORIGINAL, THETA, rotary, set_rotary
from jaxtron.weights.table import Tensor

LONGEST, BASE, WINDOW = 131072, 150000.0, 128
# of the class, where a file has no rule of stretching
USUAL = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, ORIGINAL: 4096}
ROTARY = rotary(base=BASE, positions=LONGEST)
ATTENTIONS = (*ATTENTION, Tensor("attention.sinks", "H", "self_attn.sinks", "H"))
EXPERTS = (
    Tensor("moe.router.kernel", "E N", "mlp.router.weight", "N E"),
    Tensor("moe.router.logit_bias", "N", "mlp.router.bias", "N"),
    Tensor("moe.up", "N E G F", "mlp.experts.gate_up_proj", "N E FG"),
    Tensor("moe.up_bias", "N G F", "mlp.experts.gate_up_proj_bias", "N FG"),
    Tensor("moe.down", "N F E", "mlp.experts.down_proj", "N F E"),
    Tensor("moe.down_bias", "N E", "mlp.experts.down_proj_bias", "N E"),
)


def _read_layers(file: ConfigFile) -> None:
    count = file.whole("num_hidden_layers", 36, MOST_LAYERS)
    kinds = kinds_of_layers(file, [(SLIDING, FULL)[number % 2] for number in range(count)])
    set_kinds(file, kinds, "E")
    if SLIDING in kinds and not file.has("sliding_window"):
        file.set("attention.window", WINDOW, "sliding_window")


def _write_layers(model: ModelConfig) -> dict[str, Any]:
    return {**write_kinds(model), "intermediate_size": expert_width(model)}


def _read_rotary(file: ConfigFile) -> None:
    if file.has(NEW) or file.has(OLD):
        ROTARY.read(file)
        return
    file.set("position", "rotary", "model_type")
    set_rotary(file, {THETA: file.get(THETA, BASE), FRACTION: 1.0, **USUAL}, OLD, "rotary", LONGEST)


GPT_OSS = HubFamily(
    architecture="GptOssForCausalLM",
    keys=(
        *common_keys(vocab=201088, hidden=2880, mlp=2880, layers=36, heads=64, kv_heads=8, head_dim=64),
        Key("rms_norm_eps", "norm_epsilon", 1e-5),
        Key("num_local_experts", "moe.num_experts", 128),
        Key("num_experts_per_tok", "moe.top_k", 4),
    ),
    tensors=replace(TENSORS, branches={**dict.fromkeys("*W", ATTENTIONS), "E": (*NORM, *EXPERTS)}),
    constants={
        "norm": "rms_norm",
        "bias": True,
        "activation": "clamped_swiglu",
        "attention.sinks": True,
        "moe.scores": "topk_softmax",
    },
    only={"attention_bias": True, "hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    further=(Rule(_read_layers, _write_layers), Rule(_read_rotary, ROTARY.write)),
    # another name of how many experts a token has, and the length before stretching, which is in the rule too
    without_effect=f"{WITHOUT_EFFECT} experts_per_token initial_context_length",
)

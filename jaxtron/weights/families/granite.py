"""Granite, a Llama with factors of embedding, scores, branches and logits."""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.llama import BIASES, RMS, RMS_KEYS, TENSORS, common_keys
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import rotary


def read_divisor(file: ConfigFile) -> None:
    """Of the logits."""
    value = file.get("logits_scaling", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        file.refuse("logits_scaling", "it must be a number above 0")
    file.set("logit_scale", 1 / value, "logits_scaling")


def write_divisor(model: ModelConfig) -> dict[str, Any]:
    """The whole number that it comes from, where it does."""
    divisor = 1 / model.logit_scale
    return {"logits_scaling": float(round(divisor)) if 1 / max(round(divisor), 1) == model.logit_scale else divisor}


def write_scale(model: ModelConfig) -> dict[str, Any]:
    """Also where it is the usual one."""
    return {"attention_multiplier": model.attention.scale or model.head_size**-0.5}


GRANITE = HubFamily(
    architecture="GraniteForCausalLM",
    keys=(
        *common_keys(vocab=32000, hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=None),
        *RMS_KEYS,
        Key("embedding_multiplier", "embedding_multiplier", 1.0),
        Key("residual_multiplier", "residual_multiplier", 1.0),
    ),
    tensors=TENSORS,
    constants=RMS,
    further=(
        BIASES,
        Rule(
            lambda file: file.set("attention.scale", file.get("attention_multiplier", 1.0), "attention_multiplier"),
            write_scale,
        ),
        Rule(read_divisor, write_divisor),
        rotary(),
    ),
)

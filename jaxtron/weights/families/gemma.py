"""Gemma 1, 2 and 3, whose norms store gamma - 1."""

from dataclasses import replace
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.llama import (
    ATTENTION,
    FULL,
    GATED_MLP,
    MOST_LAYERS,
    SLIDING,
    TENSORS,
    common_keys,
    kinds_of_layers,
    kinds_of_model,
    norm_rows,
    set_kinds,
)
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import FRACTION, NEW, THETA, joined, rotary, set_rotary, whole_rope, write_rotary

TANH = "gelu_pytorch_tanh"
LOCAL_BASE = "rope_local_base_freq"
NORM = {"norm": "rms_norm_1p", "bias": False}
EPSILON = Key("rms_norm_eps", "norm_epsilon", 1e-6)
# one of the stream's before a branch, and one of what the branch makes
BOTH = replace(
    TENSORS,
    branches={
        **dict.fromkeys("*W", (*norm_rows("attention_output_norm", "post_attention_layernorm"), *ATTENTION)),
        "-": (
            *norm_rows("norm", "pre_feedforward_layernorm"),
            *norm_rows("mlp_output_norm", "post_feedforward_layernorm"),
            # the first of these would be the norm of a Llama's
            *(row for row in GATED_MLP if not row.parameters[0].startswith("norm.")),
        ),
    },
)


def _read_multiplier(file: ConfigFile, hidden: int) -> None:
    file.set("embedding_multiplier", file.whole("hidden_size", hidden) ** 0.5, "hidden_size")


def multiplier(hidden: int) -> Rule:
    """Of the embedding, which follows from the width; `hidden` is the class's."""
    return Rule(lambda file: _read_multiplier(file, hidden), lambda model: {})


def read_scale(file: ConfigFile) -> None:
    """What scores are multiplied by."""
    value = file.whole("query_pre_attn_scalar", 256)
    if value < 1:
        file.refuse("query_pre_attn_scalar", "it must be a whole number above 0")
    file.set("attention.scale", value**-0.5, "query_pre_attn_scalar")


def write_scale(model: ModelConfig) -> dict[str, Any]:
    """A whole number is near."""
    scale = model.attention.scale
    return {"query_pre_attn_scalar": model.head_size if scale is None else round(scale**-2)}


def read_alternating(file: ConfigFile) -> None:
    """Gemma 2's: windows in the first layer and every second."""
    count = file.whole("num_hidden_layers", 26, MOST_LAYERS)
    set_kinds(file, kinds_of_layers(file, [(SLIDING, FULL)[number % 2] for number in range(count)]))


def write_kinds(model: ModelConfig) -> dict[str, Any]:
    """Of all layers."""
    kinds = kinds_of_model(model)
    return {"layer_types": kinds} | ({"sliding_window": model.attention.window} if SLIDING in kinds else {})


def read_mixed(file: ConfigFile) -> None:
    """Gemma 3's: a layer without a window after so many with one, each kind with positions of its own."""
    count = file.whole("num_hidden_layers", 26, MOST_LAYERS)
    # the first is of transformers 4
    every = file.whole("sliding_window_pattern", 6) if file.has("sliding_window_pattern") else None
    every = file.whole("_sliding_window_pattern", 6) if every is None else every
    usual = [FULL if every and (number + 1) % every == 0 else SLIDING for number in range(count)]
    kinds = kinds_of_layers(file, usual)
    set_kinds(file, kinds)
    found, key = joined(file)
    theta, local = file.get(THETA), file.get(LOCAL_BASE)
    usual_base = {FULL: 1e6, SLIDING: 1e4}
    own: dict[str, dict[str, Any]] = {FULL: found, SLIDING: {}}
    if any(isinstance(value, dict) for value in (file.get(NEW) or {}).values()):
        key, found = NEW, dict(file.get(NEW))
        for kind in own:
            value = found.pop(kind, None) or {}
            if not isinstance(value, dict):
                file.refuse(NEW, "it must be an object", kind)
            own[kind] = dict(value)
        if found:
            file.refuse(NEW, f"only {FULL} and {SLIDING} are known here", next(iter(found)))
    for kind, given in ((FULL, theta), (SLIDING, local)):
        own[kind] = {THETA: usual_base[kind] if given is None else given, FRACTION: 1.0} | own[kind]
    file.set("position", "rotary", "model_type")
    first = SLIDING if FULL not in kinds else FULL
    if first == FULL and SLIDING in kinds and own[FULL] != own[SLIDING]:
        set_rotary(file, own[SLIDING], key, "window_rotary", 131072)
    set_rotary(file, own[first], key, "rotary", 131072)


def write_mixed(model: ModelConfig) -> dict[str, Any]:
    """In the keys of transformers 4 where they can say it."""
    kinds = kinds_of_model(model)
    found = write_kinds(model)
    every = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if kinds == [FULL if (number + 1) % every == 0 else SLIDING for number in range(len(kinds))]:
        found["sliding_window_pattern"] = every
    window = model.window_rotary or model.rotary
    if window.scaling is not None or window.fraction != 1:
        return found | {NEW: {FULL: whole_rope(model.rotary), SLIDING: whole_rope(window)}}
    return found | write_rotary(model, partly=False, names={}) | {LOCAL_BASE: window.base}


SCALE = Rule(read_scale, write_scale)
ONLY = {"attention_bias": False, "use_bidirectional_attention": False}
GEMMA = HubFamily(
    architecture="GemmaForCausalLM",
    keys=(
        *common_keys(
            vocab=256000, hidden=3072, mlp=24576, layers=28, heads=16, kv_heads=16, head_dim=256, is_tied=True
        ),
        EPSILON,
        # the first files say gelu and mean the other
        Key("hidden_act", "activation", TANH, {TANH: "geglu_tanh", "gelu": "geglu_tanh"}),
    ),
    tensors=TENSORS,
    constants=NORM,
    only={**ONLY, "hidden_activation": TANH},
    further=(multiplier(3072), rotary(positions=8192)),
)
SMALLER = common_keys(vocab=256000, hidden=2304, mlp=9216, layers=26, heads=8, kv_heads=4, head_dim=256, is_tied=True)
ACTIVATION = Key("hidden_activation", "activation", TANH, {TANH: "geglu_tanh", "gelu": "geglu", "silu": "swiglu"})
GEMMA2 = HubFamily(
    architecture="Gemma2ForCausalLM",
    keys=(
        *SMALLER,
        EPSILON,
        ACTIVATION,
        Key("attn_logit_softcapping", "attention.soft_cap", 50.0),
        Key("final_logit_softcapping", "logit_soft_cap", 30.0),
    ),
    tensors=BOTH,
    constants={**NORM, "norm_placement": "both"},
    only=ONLY,
    further=(multiplier(2304), SCALE, Rule(read_alternating, write_kinds), rotary(positions=8192)),
    # an older name of the activation, which the class does not read
    without_effect="cache_implementation hidden_act",
)
GEMMA3 = HubFamily(
    architecture="Gemma3ForCausalLM",
    keys=(
        *(replace(key, default=262208) if key.theirs == "vocab_size" else key for key in SMALLER),
        EPSILON,
        ACTIVATION,
        Key("attn_logit_softcapping", "attention.soft_cap"),
        Key("final_logit_softcapping", "logit_soft_cap"),
    ),
    tensors=BOTH,
    constants={**NORM, "norm_placement": "both", "qk_norm": True},
    only=ONLY,
    further=(multiplier(2304), SCALE, Rule(read_mixed, write_mixed)),
    without_effect="cache_implementation",
)

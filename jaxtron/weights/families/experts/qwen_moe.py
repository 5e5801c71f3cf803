"""Qwen's mixtures of experts, 2 and 3: some layers may have an MLP in the place of experts."""

from dataclasses import replace
from functools import partial
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import expert_width
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.experts.mixtral import NORM, STACKED, STACKED_ROWS, WITHOUT_EFFECT, expert_rows
from jaxtron.weights.families.llama import (
    ATTENTION,
    FULL,
    GATED_MLP,
    MOST_LAYERS,
    RMS,
    RMS_KEYS,
    SLIDING,
    TENSORS,
    common_keys,
    kinds_of_qwen,
    set_pattern,
    write_windows,
)
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor

DENSE, STEP = "mlp_only_layers", "decoder_sparse_step"
OWN = "mlp"
SHARED = (
    Tensor(
        "moe.shared.up.kernel",
        "E G F",
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        "F E",
    ),
    Tensor("moe.shared.down.kernel", "F E", "mlp.shared_expert.down_proj.weight", "E F"),
    # of one row
    Tensor("moe.shared_gate", "E", "mlp.shared_expert_gate.weight", "O E"),
)
SINGLE = expert_rows(OWN, ("gate_proj", "up_proj", "down_proj"))
ONE_BY_ONE, IN_ONE = (
    replace(
        TENSORS,
        branches={**dict.fromkeys("*W", ATTENTION), "-": GATED_MLP, "E": (*NORM, *rows, *SHARED)},
    )
    for rows in (SINGLE, STACKED_ROWS)
)


def _read_layers(file: ConfigFile, layers: int, *, has_windows: bool) -> None:
    """The pattern: what each layer attends to, and whether it has experts."""
    count = file.whole("num_hidden_layers", layers, MOST_LAYERS)
    kinds = kinds_of_qwen(file, layers) if has_windows else [FULL] * count
    step, dense = file.whole(STEP, 1), file.get(DENSE) or []
    if step < 1:
        file.refuse(STEP, "it must be a whole number above 0")
    if not isinstance(dense, list) or not all(type(number) is int for number in dense):
        file.refuse(DENSE, "it must be a list of numbers of layers")
    mlps = ["-" if number in dense or (number + 1) % step else "E" for number in range(count)]
    if "E" not in mlps:
        file.refuse(DENSE, "no layer is left that has experts", "")
    if SLIDING in kinds:
        file.set("attention.window", file.whole("sliding_window", 4096), "sliding_window")
    pairs = [("W" if kind == SLIDING else "*") + mlp for kind, mlp in zip(kinds, mlps, strict=True)]
    first = mlps.index("E")
    if first and "-" not in mlps[first:] and len(set(kinds)) == 1:
        file.set("pattern", pairs[-1], DENSE)
        file.set("moe.leading_dense", first, DENSE)
        return
    set_pattern(file, pairs, DENSE)


def _write_layers(model: ModelConfig, *, has_windows: bool) -> dict[str, Any]:
    mlps = model.layout.layers[1::2]
    dense = [number for number, branch in enumerate(mlps) if branch == ("-",)]
    windows = write_windows(model) if has_windows else {"use_sliding_window": False}
    return {STEP: 1, DENSE: dense, "moe_intermediate_size": expert_width(model), **windows}


def _layers(layers: int, width: int, *, has_windows: bool) -> Rule:
    """With the class's count of layers and width of experts."""

    def read(file: ConfigFile) -> None:
        file.set("moe.expert_size", file.get("moe_intermediate_size", width), "moe_intermediate_size")
        _read_layers(file, layers, has_windows=has_windows)

    return Rule(read, partial(_write_layers, has_windows=has_windows))


def _read_count(file: ConfigFile) -> None:
    """Older files have the other name."""
    given, old = file.get("num_local_experts"), file.get("num_experts", 128)
    file.set(
        "moe.num_experts", old if given is None else given, "num_experts" if given is None else "num_local_experts"
    )


COUNT = Rule(_read_count, lambda model: {"num_experts": model.moe.num_experts})
SHARED_KEYS = (*RMS_KEYS, Key("norm_topk_prob", "moe.renormalize", False))
QWEN2_MOE = HubFamily(
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *common_keys(vocab=151936, hidden=2048, mlp=5632, layers=24, heads=16, kv_heads=16),
        *SHARED_KEYS,
        Key("num_experts", "moe.num_experts", 60),
        Key("num_experts_per_tok", "moe.top_k", 4),
        Key("shared_expert_intermediate_size", "moe.shared_size", 5632),
        Key("qkv_bias", "qkv_bias", True),
    ),
    tensors=ONE_BY_ONE,
    others={STACKED: IN_ONE},
    constants={**RMS, "moe.shared_gate": True},
    further=(_layers(24, 1408, has_windows=True), rotary(positions=32768)),
    without_effect=WITHOUT_EFFECT,
)
QWEN3_MOE = HubFamily(
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *common_keys(vocab=151936, hidden=2048, mlp=6144, layers=24, heads=32, kv_heads=4),
        *SHARED_KEYS,
        Key("num_experts_per_tok", "moe.top_k", 8),
    ),
    tensors=ONE_BY_ONE,
    others={STACKED: IN_ONE},
    constants={**RMS, "qk_norm": True},
    only={"attention_bias": False, "use_sliding_window": False},
    further=(COUNT, _layers(24, 768, has_windows=False), rotary(positions=32768)),
    # a window that is not used
    without_effect=f"{WITHOUT_EFFECT} max_window_layers sliding_window",
)

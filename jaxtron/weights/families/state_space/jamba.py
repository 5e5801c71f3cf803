"""Jamba: Mamba with norms inside, in some layers attention without positions; an MLP or experts after each."""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.experts.mixtral import expert_rows, stacked_rows
from jaxtron.weights.families.llama import ATTENTION, MOST_LAYERS, norm_rows, set_pattern
from jaxtron.weights.families.state_space.bamba import OUTER, mlp_rows
from jaxtron.weights.families.state_space.mixers import expansion, mamba1_rows, rank
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.table import Tensor, TensorTable

ATTENDS, MIXES, COUNT = "attn_layer", "expert_layer", "num_experts"
# a name that only files of all experts in one have
STACKED = ".feed_forward.experts.gate_up_proj"
# of layers of a kind, which others do not read
KEYS = {
    "m": (Key("mamba_d_state", "mamba.state_size", 16), Key("mamba_d_conv", "mamba.conv_width", 4)),
    "*": (Key("num_key_value_heads", "num_kv_heads", 8),),
    "E": (Key(COUNT, "moe.num_experts", 16), Key("num_experts_per_tok", "moe.top_k", 2)),
}
MIXER = (rank("mamba_dt_rank"), expansion("mamba_expand"))


def _read_layers(file: ConfigFile) -> None:
    count = file.whole("num_hidden_layers", 32, MOST_LAYERS)
    attention, experts = _every(file, ATTENDS, 8, 4), _every(file, MIXES, 2, 1)
    # one expert is an MLP
    experts = experts if file.whole(COUNT, 16) > 1 else range(0)
    layers = [("*" if number in attention else "m") + ("E" if number in experts else "-") for number in range(count)]
    if layers:
        set_pattern(file, layers, f"{ATTENDS}_period")
    for symbol, keys in KEYS.items():
        for key in keys if any(symbol in layer for layer in layers) else ():
            key.read(file)
    if any("m" in layer for layer in layers):
        for rule in MIXER:
            rule.read(file)
        file.set("mamba.inner_norms", True, "model_type")


def _every(file: ConfigFile, what: str, period: int, offset: int) -> range:
    """The numbers of layers that are of a kind; `period` and `offset` are the class's."""
    period, offset = file.whole(f"{what}_period", period), file.whole(f"{what}_offset", offset)
    if offset >= period:
        file.refuse(f"{what}_offset", f"it must be below {what}_period, which is {period}")
    return range(offset, MOST_LAYERS, period)


def _write_layers(model: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keys in KEYS.values():
        for key in keys:
            found |= key.write(model)
    for rule in MIXER:
        found |= rule.write(model)
    layers = model.layout.layers
    for what, symbol, own in ((ATTENDS, "*", layers[::2]), (MIXES, "E", layers[1::2])):
        numbers = [number for number, branch in enumerate(own) if branch == (symbol,)]
        period = numbers[1] - numbers[0] if len(numbers) > 1 else len(own) + 1
        found |= {f"{what}_period": period, f"{what}_offset": numbers[0] if numbers else len(own)}
    return found if model.layout.count("E") else found | {COUNT: 1}


NAMES = ("gate_proj", "up_proj", "down_proj")


def _table(experts: tuple[Tensor, ...]) -> TensorTable:
    return TensorTable(
        outer=OUTER,
        branches={
            "m": (*norm_rows("norm", "input_layernorm"), *mamba1_rows("mamba")),
            "*": ATTENTION,
            "-": mlp_rows(),
            "E": (*norm_rows("norm", "pre_ff_layernorm"), *experts),
        },
        layer="model.layers.{}.",
    )


JAMBA = HubFamily(
    architecture="JambaForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 65536),
        Key("hidden_size", "hidden_size", 4096),
        Key("intermediate_size", "mlp_size", 14336),
        Key("num_hidden_layers", "num_layers", 32),
        Key("num_attention_heads", "num_heads", 32),
        Key("rms_norm_eps", "norm_epsilon", 1e-6),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", False),
    ),
    tensors=_table(expert_rows("feed_forward", NAMES, "router")),
    others={STACKED: _table(stacked_rows("feed_forward", "router"))},
    constants={"norm": "rms_norm", "bias": False, "position": "none", "activation": "swiglu"},
    only={
        **{"mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_inner_layernorms": True, "hidden_act": "silu"},
        "sliding_window": None,
    },
    further=(Rule(_read_layers, _write_layers),),
    # those of layers that the model has not are among them
    without_effect=" ".join(
        (
            *(key.theirs for keys in KEYS.values() for key in keys),
            *("mamba_dt_rank", "mamba_expand", "auto_map", "calc_logits_for_entire_prompt", "n_ctx"),
            *("num_logits_to_keep", "output_router_logits", "router_aux_loss_coef", "use_associative_scan"),
            *("use_mamba_kernels", "use_mambapy"),
        )
    ),
)

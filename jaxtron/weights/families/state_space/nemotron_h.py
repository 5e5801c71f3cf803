"""Nemotron-H: a layer is one of Mamba-2, attention without positions, an MLP, or experts, as a string spells."""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import expert_width
from jaxtron.models.decoder.state_space import mamba2_heads
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.llama import PLAIN, linear_rows, norm_rows, set_pattern
from jaxtron.weights.families.state_space.mamba import MIXER, NORM
from jaxtron.weights.families.state_space.mixers import (
    FIRST,
    LIMIT,
    UNBOUNDED,
    mamba2_rows,
    read_limit,
    set_steps,
    write_first_steps,
)
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.table import Tensor, TensorTable

PATTERN, LISTS = "hybrid_override_pattern", ("layers_block_type", "layer_types")
# the first are of transformers 5, the others of before
SYMBOLS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E", "mamba": "M", "attention": "*"}
HEAD, OLD_HEAD = "head_dim", "attention_head_dim"
# of layers of a kind, which others do not read
KEYS = {
    "M": (
        Key("mamba_num_heads", "mamba.num_heads", 128),
        Key("mamba_head_dim", "mamba.head_dim", 64),
        Key("ssm_state_size", "mamba.state_size", 128),
        Key("n_groups", "mamba.num_groups", 8),
        Key("conv_kernel", "mamba.conv_width", 4),
    ),
    "*": (Key("num_key_value_heads", "num_kv_heads", 8),),
    "-": (Key("mlp_hidden_act", "activation", "relu2", PLAIN), Key("intermediate_size", "mlp_size", 21504)),
    "E": (
        Key("mlp_hidden_act", "activation", "relu2", PLAIN),
        Key("n_routed_experts", "moe.num_experts", 8),
        Key("num_experts_per_tok", "moe.top_k", 2),
        Key("moe_intermediate_size", "moe.expert_size", 7688),
        Key("moe_shared_expert_intermediate_size", "moe.shared_size", 7688),
        Key("routed_scaling_factor", "moe.scaling", 1.0),
        Key("norm_topk_prob", "moe.renormalize", True),
        Key("n_group", "moe.groups", 1),
        Key("topk_group", "moe.top_groups", 1),
    ),
}
EXPERTS = {"moe.scores": "sigmoid", "moe.bias_rate": 0.001}


def _read_layers(file: ConfigFile) -> None:
    pattern, key = _pattern(file)
    count = file.get("num_hidden_layers")
    if count not in (None, len(pattern)):
        file.refuse("num_hidden_layers", f"{key} has {len(pattern):,} layers")
    set_pattern(file, list(pattern), key)
    for symbol, keys in KEYS.items():
        for each in keys if symbol in pattern else ():
            each.read(file)
    if "M" in pattern:
        _read_steps(file)
    if "*" in pattern:
        _read_head(file)
    if "E" in pattern:
        _read_experts(file)
    if file.flag("mlp_bias", False):
        if "E" in pattern:
            file.refuse("mlp_bias", "that the MLP beside experts has a bias, and they have none, is not known here")
        file.set("mlp_bias", True, "mlp_bias")


def _pattern(file: ConfigFile) -> tuple[str, str]:
    """A symbol for each layer, and the key that says it."""
    text, lists = file.get(PATTERN), {key: file.get(key) for key in LISTS}
    for key, kinds in lists.items():
        if kinds is None:
            continue
        if (
            not isinstance(kinds, list)
            or not kinds
            or not all(isinstance(one, str) and one in SYMBOLS for one in kinds)
        ):
            file.refuse(key, f"it must be a list of {', '.join(list(SYMBOLS)[:4])}")
        return "".join(SYMBOLS[kind] for kind in kinds), key
    text = "ME*-" if text is None else text
    if not isinstance(text, str) or not text or set(text) - set(SYMBOLS.values()):
        file.refuse(PATTERN, "it must be a string of M, *, - and E")
    return text, PATTERN


def _read_steps(file: ConfigFile) -> None:
    """The class cuts steps below at the least of first ones."""
    if read_limit(file) != UNBOUNDED:
        file.refuse(
            LIMIT, f"the class does not read it and takes {FIRST} as the lower bound; only [0.0, Infinity] is known"
        )
    set_steps(file, (file.number(FIRST, 0.001), None), FIRST)


def _read_head(file: ConfigFile) -> None:
    own, old = file.get(HEAD), file.get(OLD_HEAD)
    if None not in (own, old) and own != old:
        file.refuse(OLD_HEAD, f"{HEAD} says {own}")
    value, key = (own, HEAD) if old is None else (old, OLD_HEAD)
    file.set("head_dim", 128 if value is None else value, key)


def _read_experts(file: ConfigFile) -> None:
    for setting, value in EXPERTS.items():
        file.set(setting, value, "model_type")
    if file.get("n_group", 1) != 1:
        file.set("moe.group_score", "two_largest", "n_group")
    if not file.whole("moe_shared_expert_intermediate_size", 7688):
        file.refuse("moe_shared_expert_intermediate_size", "the class has an MLP beside its experts always")


def _write_layers(model: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keys in KEYS.values():
        for key in keys:
            found |= key.write(model)
    layers = model.layout.layers
    return found | {
        PATTERN: "".join("".join(branch) for branch in layers),
        "num_hidden_layers": len(layers),
        "mamba_num_heads": mamba2_heads(model),
        HEAD: model.head_size,
        "moe_intermediate_size": expert_width(model),
        "mlp_bias": model.has_mlp_bias,
        **_write_steps(model),
    }


def _write_steps(model: ModelConfig) -> dict[str, Any]:
    """In the class's words; an upper bound it has not, as reading tells."""
    low, high = model.mamba.dt_limit
    return write_first_steps(model) | {FIRST: low} | ({} if high is None else {LIMIT: [low, high]})


def _table(beginning: str, experts: tuple[Tensor, ...]) -> TensorTable:
    """That of files whose names begin so."""
    attention = [
        row
        for ours, theirs, heads in (("query", "q", "H"), ("key", "k", "K"), ("value", "v", "K"))
        for row in linear_rows(f"attention.{ours}", f"{MIXER}.{theirs}_proj", ("E", f"{heads}D"))
    ]
    mlp = linear_rows("mlp.up", f"{MIXER}.up_proj", ("E", "F")) + linear_rows(
        "mlp.down", f"{MIXER}.down_proj", ("F", "E")
    )
    return TensorTable(
        outer=(
            Tensor("embedding.table", "V E", f"{beginning}embeddings.weight", "V E"),
            *norm_rows("final_norm", f"{beginning}norm_f"),
            Tensor("head.table", "V E", "lm_head.weight", "V E"),
        ),
        branches={
            "M": (*NORM, *mamba2_rows(MIXER)),
            "*": (*NORM, *attention, *linear_rows("attention.output", f"{MIXER}.o_proj", ("HD", "E"))),
            "-": (*NORM, *mlp),
            "E": (
                *NORM,
                Tensor("moe.router.kernel", "E N", f"{MIXER}.gate.weight", "N E"),
                Tensor("moe.router.bias", "N", f"{MIXER}.gate.e_score_correction_bias", "N", is_wide=True),
                *experts,
                Tensor("moe.shared.up.kernel", "E F", f"{MIXER}.shared_experts.up_proj.weight", "F E"),
                Tensor("moe.shared.down.kernel", "F E", f"{MIXER}.shared_experts.down_proj.weight", "E F"),
            ),
        },
        layer=beginning + "layers.{}.",
        branches_in_one=1,
        base=beginning,
    )


EACH = (
    Tensor("moe.up", "N E G F", f"{MIXER}.experts.{{}}.up_proj.weight", "F E"),
    Tensor("moe.down", "N F E", f"{MIXER}.experts.{{}}.down_proj.weight", "E F"),
)
# as transformers 5 has them in memory
IN_ONE = (
    Tensor("moe.up", "N E G F", f"{MIXER}.experts.up_proj", "N F E"),
    Tensor("moe.down", "N F E", f"{MIXER}.experts.down_proj", "N E F"),
)
NEMOTRON_H = HubFamily(
    architecture="NemotronHForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 131072),
        Key("hidden_size", "hidden_size", 4096),
        Key("num_attention_heads", "num_heads", 32),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", False),
    ),
    tensors=_table("backbone.", EACH),
    others={"model.norm_f.weight": _table("model.", IN_ONE)},
    constants={"norm": "rms_norm", "bias": False, "position": "none"},
    only={
        **{"use_bias": False, "mamba_proj_bias": False, "attention_bias": False, "use_conv_bias": True},
        **{"mamba_hidden_act": "silu", "sliding_window": None, "moe_latent_size": None, "n_shared_experts": 1},
        "num_nextn_predict_layers": 0,
    },
    further=(Rule(_read_layers, _write_layers),),
    # those of kinds of layers that the model has not are among them, and what the class has no use for
    without_effect=" ".join(
        (
            *(key.theirs for keys in KEYS.values() for key in keys),
            *(HEAD, OLD_HEAD, FIRST, LIMIT, "time_step_max", "time_step_floor", "time_step_rank", "expand"),
            *("auto_map", "chunk_size", "hidden_dropout", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap"),
            *("mtp_hybrid_override_pattern", "mtp_layers_block_type", "norm_eps", "num_logits_to_keep"),
            *("output_router_logits", "partial_rotary_factor", "rescale_prenorm_residual", "residual_in_fp32"),
            *("rms_norm_eps", "rope_theta", "use_mamba_kernels"),
        )
    ),
)

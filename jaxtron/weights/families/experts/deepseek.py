"""DeepSeek-V2 and V3: latent attention, and experts in groups beside an MLP for all, after some layers with MLPs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import expert_width
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.experts.mixtral import STACKED, STACKED_ROWS, expert_rows
from jaxtron.weights.families.llama import GATED, GATED_MLP, MOST_LAYERS, TENSORS, linear_rows, norm_rows
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.orders import neighbours_of_latent_queries, neighbours_of_latents
from jaxtron.weights.rotary import joined, rotary
from jaxtron.weights.table import Tensor

DENSE, SHARED, WIDTH = "first_k_dense_replace", "n_shared_experts", "moe_intermediate_size"
GROUPS = (Key("n_group", "moe.groups", 1), Key("topk_group", "moe.top_groups", 1))
METHOD, BY_GROUP, ANY = "topk_method", "group_limited_greedy", "greedy"
# of norms of latents, whatever a file says
EPSILON = 1e-6


def _has_latent_queries(model: ModelConfig) -> bool:
    return model.latent.q_lora_rank is not None


QUERIES = Tensor(
    "attention.query.kernel",
    "R H D",
    "self_attn.q_b_proj.weight",
    "HD R",
    neighbours_of_latent_queries,
    when=_has_latent_queries,
)
ATTENTION = (
    *norm_rows("norm", "input_layernorm"),
    *linear_rows("attention.query_down", "self_attn.q_a_proj", ("E", "R")),
    *norm_rows("attention.query_norm", "self_attn.q_a_layernorm", "R"),
    QUERIES,
    replace(QUERIES, theirs="self_attn.q_proj.weight", when=lambda model: not _has_latent_queries(model)),
    *(
        replace(row, rows=neighbours_of_latents)
        for row in linear_rows("attention.down", "self_attn.kv_a_proj_with_mqa", ("E", "R"))
    ),
    *norm_rows("attention.norm", "self_attn.kv_a_layernorm", "R"),
    Tensor("attention.up.kernel", "R H D", "self_attn.kv_b_proj.weight", "HD R"),
    *linear_rows("attention.output", "self_attn.o_proj", ("HD", "E")),
)
BESIDE = (
    *norm_rows("norm", "post_attention_layernorm"),
    Tensor("moe.router.bias", "N", "mlp.gate.e_score_correction_bias", "N", is_wide=True),
    Tensor(
        "moe.shared.up.kernel",
        "E G F",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        "F E",
    ),
    Tensor("moe.shared.down.kernel", "F E", "mlp.shared_experts.down_proj.weight", "E F"),
)
ONE_BY_ONE, IN_ONE = (
    replace(TENSORS, branches={"L": ATTENTION, "-": GATED_MLP, "E": (*BESIDE, *rows)}, further="eh_proj.weight")
    for rows in (expert_rows("mlp", ("gate_proj", "up_proj", "down_proj")), STACKED_ROWS)
)


def _keys(*, vocab: int, hidden: int, mlp: int, layers: int, heads: int) -> tuple[Key, ...]:
    """Those of both, with the sizes of the class."""
    latent = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    return (
        Key("vocab_size", "vocab_size", vocab),
        Key("hidden_size", "hidden_size", hidden),
        Key("intermediate_size", "mlp_size", mlp),
        Key("num_hidden_layers", "num_layers", layers),
        Key("num_attention_heads", "num_heads", heads),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", False),
        Key("hidden_act", "activation", "silu", GATED),
        *(Key(name, f"latent.{name}", size) for name, size in (latent | {"v_head_dim": 128}).items()),
    )


def _read_attention(file: ConfigFile, heads: int, kv_heads: int | None) -> None:
    """What its class asks of it."""
    count, given = file.get("num_attention_heads", heads), file.get("num_key_value_heads", kv_heads)
    if given not in (None, count):
        file.refuse("num_key_value_heads", "all heads have keys of their own: only num_attention_heads is known here")
    if file.number("rms_norm_eps", EPSILON) != EPSILON:
        file.refuse("rms_norm_eps", f"only {EPSILON} is known here, which the class takes in norms of latents always")
    file.set("norm_epsilon", EPSILON, "rms_norm_eps")
    rope, key = joined(file)
    if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
        file.refuse(key, "only both of mscale and mscale_all_dim, or none, are known here", "mscale")
    if file.flag("attention_bias", False):
        for setting, value in (("bias", True), ("mlp_bias", False), ("moe.bias", False)):
            file.set(setting, value, "attention_bias")
    else:
        file.set("bias", False, "attention_bias")


def _write_attention(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": model.num_heads,
        "rms_norm_eps": model.norm_epsilon,
        "attention_bias": model.bias,
    }


def _read_layers(file: ConfigFile, layers: int, usual: Mapping[str, int | None]) -> bool:
    """MLPs, then experts, if any layer has them; `usual` are the class's numbers."""
    count, first = file.whole("num_hidden_layers", layers, MOST_LAYERS), file.whole(DENSE, usual[DENSE] or 0)
    file.set("pattern", "LE" if first < count else "L-", DENSE)
    if first >= count:
        return False
    file.set("moe.leading_dense", first, DENSE)
    width, shared = file.whole(WIDTH, usual[WIDTH] or 0), file.whole(SHARED, usual[SHARED] or 0)
    if not shared:
        file.refuse(SHARED, "the class has an MLP beside its experts always")
    file.set("moe.expert_size", width, WIDTH)
    file.set("moe.shared_size", width * shared, SHARED)
    for key, setting in (("n_routed_experts", "num_experts"), ("num_experts_per_tok", "top_k")):
        # one of the second class has no number of its own
        file.set(f"moe.{setting}", file.whole(key, usual[key] or 0), key)
    return True


def _write_layers(model: ModelConfig) -> dict[str, Any]:
    mlps, width = model.layout.layers[1::2], expert_width(model)
    return {
        DENSE: mlps.index(("E",)) if ("E",) in mlps else len(mlps),
        WIDTH: width,
        # no whole number is told by reading
        SHARED: model.moe.shared_size // max(width, 1),
        "n_routed_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "routed_scaling_factor": model.moe.scaling,
        "n_group": model.moe.groups,
        "topk_group": model.moe.top_groups,
    }


V2 = {DENSE: 0, WIDTH: 1407, SHARED: 2, "n_routed_experts": 64, "num_experts_per_tok": None}
V3 = {DENSE: 3, WIDTH: 2048, SHARED: 1, "n_routed_experts": 256, "num_experts_per_tok": 8}


def _read_v2(file: ConfigFile) -> None:
    _read_attention(file, 32, None)
    method = file.get(METHOD, ANY)
    if method not in (ANY, BY_GROUP):
        file.refuse(METHOD, f"{ANY} and {BY_GROUP} are known here")
    if _read_layers(file, 32, V2):
        file.set("moe.scaling", file.get("routed_scaling_factor", 1.0), "routed_scaling_factor")
        for key in GROUPS if method == BY_GROUP else ():
            key.read(file)


def _read_v3(file: ConfigFile) -> None:
    _read_attention(file, 128, 128)
    if not _read_layers(file, 61, V3):
        return
    file.set("moe.scores", "sigmoid", "model_type")
    file.set("moe.bias_rate", 0.001, "model_type")
    file.set("moe.renormalize", file.flag("norm_topk_prob", True), "norm_topk_prob")
    file.set("moe.scaling", file.get("routed_scaling_factor", 2.5), "routed_scaling_factor")
    groups = file.whole("n_group", 8)
    file.set("moe.groups", groups, "n_group")
    file.set("moe.top_groups", file.whole("topk_group", 4), "topk_group")
    if groups > 1:
        file.set("moe.group_score", "two_largest", "n_group")


def _write_v2(model: ModelConfig) -> dict[str, Any]:
    method = BY_GROUP if model.moe.groups > 1 else ANY
    return _write_attention(model) | _write_layers(model) | {METHOD: method}


def _write_v3(model: ModelConfig) -> dict[str, Any]:
    # layers that predict further tokens are not written
    found = {"norm_topk_prob": model.moe.renormalize, "num_nextn_predict_layers": 0}
    return _write_attention(model) | _write_layers(model) | found


ONLY = {"moe_layer_freq": 1}
# of training, of code beside the files, and what follows from others; those of experts where a model has none
WITHOUT_EFFECT = " ".join(
    (
        *("aux_loss_alpha", "auto_map", "ep_size", "head_dim", "num_nextn_predict_layers", "output_router_logits"),
        *("qk_head_dim", "router_aux_loss_coef", "seq_aux", *V2, "routed_scaling_factor", "n_group", "topk_group"),
    )
)
DEEPSEEK_V2 = HubFamily(
    architecture="DeepseekV2ForCausalLM",
    keys=_keys(vocab=102400, hidden=4096, mlp=11008, layers=32, heads=32),
    tensors=ONE_BY_ONE,
    others={STACKED: IN_ONE},
    constants={"norm": "rms_norm"},
    only={**ONLY, "mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax"},
    further=(Rule(_read_v2, _write_v2), rotary()),
    without_effect=WITHOUT_EFFECT,
)
DEEPSEEK_V3 = HubFamily(
    architecture="DeepseekV3ForCausalLM",
    keys=_keys(vocab=129280, hidden=7168, mlp=18432, layers=61, heads=128),
    tensors=ONE_BY_ONE,
    others={STACKED: IN_ONE},
    constants={"norm": "rms_norm"},
    only={**ONLY, "rope_interleave": True, "scoring_func": "sigmoid", METHOD: "noaux_tc"},
    further=(Rule(_read_v3, _write_v3), rotary(positions=4096)),
    without_effect=f"{WITHOUT_EFFECT} norm_topk_prob",
)

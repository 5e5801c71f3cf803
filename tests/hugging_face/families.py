"""Models of Hugging Face transformers as Jaxtron's: settings of a `config.json`, and weights by reshaping alone."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.pattern import layer_kinds
from jaxtron.models.decoder.state_space import mamba2_heads
from tests.hugging_face.fixtures import Fixture

Config = dict[str, Any]
Arrays = dict[str, np.ndarray]


def common(config: Config) -> dict[str, Any]:
    """Settings that all families here share."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
        "vocab_multiple": 16,
        "activation": "swiglu",
        "norm": "rms_norm",
        "norm_epsilon": config["rms_norm_eps"],
        "bias": False,
        "position": "rotary",
        "rotary": rotary(config["rope_parameters"]),
        "tied_head": config["tie_word_embeddings"],
        "mlp_size": config["intermediate_size"],
    }


def rotary(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"base": config["rope_theta"]}
    if config["rope_type"] == "yarn":
        names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        original = {"original_length": config["original_max_position_embeddings"]}
        found["scaling"] = {"kind": "yarn", **original, **{name: config[name] for name in names if name in config}}
    return found


def deepseek(config: Config) -> dict[str, Any]:
    widths = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {
        "pattern": "LE",
        "latent": {name: config[name] for name in widths},
        "moe": {
            "leading_dense": config["first_k_dense_replace"],
            "num_experts": config["n_routed_experts"],
            "top_k": config["num_experts_per_tok"],
            "expert_size": config["moe_intermediate_size"],
            "shared_size": config["moe_intermediate_size"] * config["n_shared_experts"],
            "scaling": config["routed_scaling_factor"],
        },
    }


def deepseek_v2(config: Config) -> dict[str, Any]:
    found = deepseek(config)
    if config["topk_method"] == "group_limited_greedy":
        found["moe"] |= {"groups": config["n_group"], "top_groups": config["topk_group"]}
    return found


def deepseek_v3(config: Config) -> dict[str, Any]:
    found = deepseek(config)
    found["moe"] |= {
        "scores": "sigmoid",
        "bias_rate": 0.001,
        "renormalize": config["norm_topk_prob"],
        "groups": config["n_group"],
        "top_groups": config["topk_group"],
        "group_score": "two_largest",
    }
    return found


def hybrid(config: Config) -> dict[str, Any]:
    """Settings that families with state-space layers share."""
    return {
        "num_layers": 1,
        "hidden_size": config["hidden_size"],
        "num_heads": config.get("num_attention_heads", 1),
        "vocab_size": config["vocab_size"],
        "vocab_multiple": 16,
        "norm": "rms_norm",
        "norm_epsilon": config.get("layer_norm_epsilon") or config["rms_norm_eps"],
        "bias": False,
        "position": "none",
        "tied_head": config["tie_word_embeddings"],
    }


def steps(limit: list[Any]) -> dict[str, Any]:
    """Bounds of steps; files write infinity as a word."""
    low, high = limit
    most = None if isinstance(high, dict | str) or math.isinf(high) else high
    # of first values, which these models do not have: any that the bounds let through
    return {"dt_limit": (low, most), "dt_range": (max(low, 1e-3), max(2 * low, 0.1))}


def nemotron_h(config: Config) -> dict[str, Any]:
    symbols = {"linear_attention": "M", "mlp": "-", "full_attention": "*"}
    return {
        "pattern": "".join(symbols[kind] for kind in config["layers_block_type"]),
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "activation": {"gelu": "gelu", "relu2": "squared_relu"}[config["mlp_hidden_act"]],
        "mlp_size": config["intermediate_size"],
        "mamba": {
            "num_heads": config["mamba_num_heads"],
            "head_dim": config["mamba_head_dim"],
            "state_size": config["ssm_state_size"],
            "num_groups": config["n_groups"],
            "conv_width": config["conv_kernel"],
            # it cuts steps below at this, and not at its time_step_limit
            **steps([config["time_step_min"], math.inf]),
        },
    }


def bamba(config: Config) -> dict[str, Any]:
    fraction = config["rope_parameters"]["partial_rotary_factor"]
    attends = config["attn_layer_indices"]
    return {
        "pattern": "".join("*-" if number in attends else "M-" for number in range(config["num_hidden_layers"])),
        "num_kv_heads": config["num_key_value_heads"],
        "activation": "swiglu",
        "mlp_size": config["intermediate_size"],
        "position": "rotary",
        "rotary": {"base": config["rope_parameters"]["rope_theta"], "fraction": fraction},
        "mamba": {
            "num_heads": config["mamba_n_heads"],
            "head_dim": config["mamba_d_head"],
            "state_size": config["mamba_d_state"],
            "num_groups": config["mamba_n_groups"],
            "conv_width": config["mamba_d_conv"],
            **steps(config["time_step_limit"]),
        },
    }


def jamba(config: Config) -> dict[str, Any]:
    def is_at(number: int, what: str) -> bool:
        return number % config[f"{what}_layer_period"] == config[f"{what}_layer_offset"]

    numbers = range(config["num_hidden_layers"])
    return {
        "pattern": "".join("m*"[is_at(one, "attn")] + "-E"[is_at(one, "expert")] for one in numbers),
        "num_kv_heads": config["num_key_value_heads"],
        "activation": "swiglu",
        "mlp_size": config["intermediate_size"],
        "mamba": {
            "state_size": config["mamba_d_state"],
            "dt_rank": config["mamba_dt_rank"],
            "expand": config["mamba_expand"],
            "conv_width": config["mamba_d_conv"],
            "inner_norms": True,
        },
        "moe": {"num_experts": config["num_experts"], "top_k": config["num_experts_per_tok"], "renormalize": False},
    }


FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "nemotron_h": nemotron_h,
    "bamba": bamba,
    "jamba": jamba,
}
# those whose layers are by pattern
HYBRID = ("nemotron_h", "bamba", "jamba")


def model_of(fixture: Fixture) -> ModelConfig:
    """The settings of the same model."""
    config = fixture.config
    shared = hybrid if config["model_type"] in HYBRID else common
    return ModelConfig(**{**shared(config), **FAMILIES[config["model_type"]](config)})


class Reader:
    """A model's weights by name, each of which must be taken."""

    def __init__(self, weights: Arrays) -> None:
        self.left = dict(weights)

    def __call__(self, name: str) -> np.ndarray:
        return self.left.pop(name)

    def has(self, name: str) -> bool:
        return name in self.left


def parameters_of(fixture: Fixture, model: ModelConfig) -> Arrays:
    """By name, as `Blueprint.names` has them, every weight of the fixture, layers of a period stacked."""
    read = Reader({name.replace("backbone.", "model."): array for name, array in fixture.weights.items()})
    padding = ((0, model.padded_vocab - model.vocab_size), (0, 0))
    table = "embeddings" if read.has("model.embeddings.weight") else "embed_tokens"
    found = {"embedding.table": np.pad(read(f"model.{table}.weight"), padding)}
    found |= {"head.table": np.pad(read("lm_head.weight"), padding)} if not model.tied_head else {}
    (last,) = (name for name in ("norm", "norm_f", "final_layernorm") if read.has(f"model.{name}.weight"))
    found["final_norm.scale"] = read(f"model.{last}.weight")
    found |= stacked_by_place(layers_of(read, fixture.config, model), model)
    assert not read.left, list(read.left)
    return found


def stacked_by_place(layers: list[Arrays], model: ModelConfig) -> Arrays:
    """By the names of a model's parameters, of each layer's in order."""
    size, found = len(model.layout.period), {}
    for number in range(len(model.layout.leading)):
        for place in range(size):
            found |= {f"stack.leading.{number}.layers.{place}.{name}": one for name, one in layers.pop(0).items()}
    for place in range(0 if model.layout.mixed else size):
        for name in layers[place]:
            found[f"stack.periods.layers.{place}.{name}"] = np.stack([layer[name] for layer in layers[place::size]])
    kinds = layer_kinds(model.layout)
    for kind in model.layout.kinds:
        alike = [layer for own, layer in zip(kinds, layers, strict=True) if own == kind]
        for name in alike[0]:
            found[f"stack.layers.{kind}.{name}"] = np.stack([layer[name] for layer in alike])
    return found


def layers_of(read: Reader, config: Config, model: ModelConfig) -> list[Arrays]:
    """Those of the pattern, in order."""
    if config["model_type"] in HYBRID:
        return [
            hybrid_layer(read, place, symbol, model, two_in_one=config["model_type"] in ("bamba", "jamba"))
            for place, (symbol,) in enumerate(model.layout.layers)
        ]
    # a transformer's layer is two of ours
    attend = latent_layer if "kv_lora_rank" in config else attention_layer
    return [
        layer
        for number in range(config["num_hidden_layers"])
        for layer in (attend(read, number, model), mlp_layer(read, number, model))
    ]


def hybrid_layer(read: Reader, place: int, symbol: str, model: ModelConfig, *, two_in_one: bool) -> Arrays:
    """Norm and what it is for; two_in_one: every second layer of ours, an MLP, is in the layer of theirs before."""
    layer = f"model.layers.{place // 2 if two_in_one else place}"
    inner = {**dict.fromkeys("mM", "mamba"), "*": "self_attn", **dict.fromkeys("-E", "feed_forward")}
    names = inner if two_in_one else dict.fromkeys("mM*-", "mixer")
    norms = {**dict.fromkeys("mM*", "input_layernorm"), **dict.fromkeys("-E", "pre_ff_layernorm")}
    found = {"norm.scale": read(f"{layer}.{norms[symbol] if two_in_one else 'norm'}.weight")}
    own = f"{layer}.{names[symbol]}"
    if symbol in "mM":
        made = (selective_mixer if symbol == "m" else mixer)(read, own, model)
        return found | {f"mamba.{name}": value for name, value in made.items()}
    if symbol == "*":
        return found | attention(read, own, model)
    if symbol == "E":
        experts = [mlp(read, f"{own}.experts.{expert}") for expert in range(model.moe.num_experts)]
        found |= {f"moe.{name}": np.stack([expert[name] for expert in experts]) for name in ("up", "down")}
        return found | {"moe.router.kernel": read(f"{own}.router.weight").T}
    if two_in_one:
        return found | {f"mlp.{name}.kernel": kernel for name, kernel in mlp(read, own).items()}
    return found | {f"mlp.{name}.kernel": read(f"{own}.{name}_proj.weight").T for name in ("up", "down")}


def mixer(read: Reader, own: str, model: ModelConfig) -> Arrays:
    """A Mamba-2 layer: rows of the first product are z, x, B, C and steps, channels of the convolution x, B, C."""
    mamba, heads = model.mamba, mamba2_heads(model)
    by_head, by_group = (heads, mamba.head_dim), (mamba.num_groups, mamba.state_size)
    cuts = np.cumsum([math.prod(shape) for shape in (by_head, by_head, by_group, by_group)])
    found: Arrays = {}
    *products, steps = np.split(read(f"{own}.in_proj.weight"), cuts)
    for name, rows in zip("zxBC", products, strict=True):
        found[f"{name}.kernel"] = rows.T.reshape(model.hidden_size, *(by_head if name in "zx" else by_group))
    found["dt.kernel"] = steps.T
    taps, biases = read(f"{own}.conv1d.weight")[:, 0].T, read(f"{own}.conv1d.bias")
    for name, kernel, bias in zip("xBC", *(np.split(a, cuts[1:3] - cuts[0], -1) for a in (taps, biases)), strict=True):
        shape = by_head if name == "x" else by_group
        found[f"conv_{name}.kernel"] = kernel.reshape(-1, *shape)
        found[f"conv_{name}.bias"] = bias.reshape(shape)
    found |= {name: read(f"{own}.{name}") for name in ("A_log", "D", "dt_bias")}
    found["norm.scale"] = read(f"{own}.norm.weight").reshape(by_head)
    return found | {"output.kernel": read(f"{own}.out_proj.weight").T.reshape(*by_head, -1)}


def selective_mixer(read: Reader, own: str, model: ModelConfig) -> Arrays:
    """A Mamba layer: rows of the first product are x and the gate, of the second what steps are made of, B and C."""
    found = {name: read(f"{own}.{name}") for name in ("A_log", "D")}
    found["input.kernel"] = read(f"{own}.in_proj.weight").T.reshape(model.hidden_size, 2, -1)
    found["conv.kernel"] = read(f"{own}.conv1d.weight")[:, 0].T
    found["conv.bias"] = read(f"{own}.conv1d.bias")
    found["x_proj.kernel"] = read(f"{own}.x_proj.weight").T
    for ours in ("dt", "B", "C") if model.mamba.inner_norms else ():
        found[f"{ours}_norm.scale"] = read(f"{own}.{ours.lower()}_layernorm.weight")
    found["dt_proj"], found["dt_bias"] = read(f"{own}.dt_proj.weight").T, read(f"{own}.dt_proj.bias")
    return found | {"output.kernel": read(f"{own}.out_proj.weight").T}


def attention_layer(read: Reader, number: int, model: ModelConfig) -> Arrays:
    """Norm and attention."""
    layer = f"model.layers.{number}"
    found = {"norm.scale": read(f"{layer}.input_layernorm.weight")}
    return found | attention(read, f"{layer}.self_attn", model)


def attention(read: Reader, own: str, model: ModelConfig) -> Arrays:
    """Projections, perhaps biases and norms."""
    found, output = {}, read(f"{own}.o_proj.weight").T
    found["attention.output.kernel"] = output.reshape(model.num_heads, model.head_size, model.hidden_size)
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
        kernel = read(f"{own}.{theirs}_proj.weight").T
        found[f"attention.{ours}.kernel"] = kernel.reshape(model.hidden_size, -1, model.head_size)
        if read.has(f"{own}.{theirs}_proj.bias"):
            found[f"attention.{ours}.bias"] = read(f"{own}.{theirs}_proj.bias").reshape(-1, model.head_size)
    if read.has(f"{own}.o_proj.bias"):
        found["attention.output.bias"] = read(f"{own}.o_proj.bias")
    return found


def latent_layer(read: Reader, number: int, model: ModelConfig) -> Arrays:
    """Norm and latent attention; pairs that are rotated are neighbours there, and halves here."""
    layer, own = f"model.layers.{number}", f"model.layers.{number}.self_attn"
    latent, heads = model.latent, model.num_heads
    paired = np.arange(latent.qk_rope_head_dim).reshape(-1, 2).T.reshape(-1)
    order = np.concatenate([np.arange(latent.qk_nope_head_dim), latent.qk_nope_head_dim + paired])
    found = {"norm.scale": read(f"{layer}.input_layernorm.weight")}
    down = read(f"{own}.kv_a_proj_with_mqa.weight").T
    found["attention.down.kernel"] = np.concatenate(
        [down[:, : latent.kv_lora_rank], down[:, latent.kv_lora_rank :][:, paired]], 1
    )
    found["attention.norm.scale"] = read(f"{own}.kv_a_layernorm.weight")
    found["attention.up.kernel"] = read(f"{own}.kv_b_proj.weight").T.reshape(latent.kv_lora_rank, heads, -1)
    queries = "q_proj"
    if latent.q_lora_rank:
        queries = "q_b_proj"
        found["attention.query_down.kernel"] = read(f"{own}.q_a_proj.weight").T
        found["attention.query_norm.scale"] = read(f"{own}.q_a_layernorm.weight")
    query = read(f"{own}.{queries}.weight").T
    found["attention.query.kernel"] = query.reshape(len(query), heads, latent.key_dim)[:, :, order]
    output = read(f"{own}.o_proj.weight").T
    return found | {"attention.output.kernel": output.reshape(heads, latent.v_head_dim, model.hidden_size)}


def mlp_layer(read: Reader, number: int, model: ModelConfig) -> Arrays:
    """Norm, and an MLP or experts."""
    layer = f"model.layers.{number}"
    found = {"norm.scale": read(f"{layer}.post_attention_layernorm.weight")}
    own = f"{layer}.mlp"
    if not read.has(f"{own}.gate.weight"):
        return found | {f"mlp.{name}.kernel": kernel for name, kernel in mlp(read, own).items()}
    found["moe.router.kernel"] = read(f"{own}.gate.weight").T
    if read.has(f"{own}.gate.e_score_correction_bias"):
        found["moe.router.bias"] = read(f"{own}.gate.e_score_correction_bias")
    experts = [mlp(read, f"{own}.experts.{expert}") for expert in range(model.moe.num_experts)]
    found |= {f"moe.{name}": np.stack([expert[name] for expert in experts]) for name in ("up", "down")}
    if model.moe.shared_size:
        shared = mlp(read, f"{own}.shared_experts")
        found |= {f"moe.shared.{name}.kernel": kernel for name, kernel in shared.items()}
    return found


def mlp(read: Reader, own: str) -> Arrays:
    """Gate and up in one, and down."""
    gate, up, down = (read(f"{own}.{name}_proj.weight").T for name in ("gate", "up", "down"))
    return {"up": np.stack([gate, up], 1), "down": down}

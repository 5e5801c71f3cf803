"""Mixtures of Hugging Face transformers as Jaxtron's: settings of a `config.json`, and weights by reshaping alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtron.models.decoder.config import ModelConfig
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
        names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        original = {"original_length": config["original_max_position_embeddings"]}
        found["scaling"] = {"kind": "yarn", **original, **{name: config[name] for name in names}}
    return found


def mixtral(config: Config) -> dict[str, Any]:
    experts = {"num_experts": config["num_local_experts"], "top_k": config["num_experts_per_tok"]}
    settings = {"pattern": "*E", "num_kv_heads": config["num_key_value_heads"], "head_dim": config["head_dim"]}
    return {**settings, "moe": {**experts, "scores": "topk_softmax"}}


def qwen2_moe(config: Config) -> dict[str, Any]:
    assert not config["use_sliding_window"] and not config["mlp_only_layers"]
    step = config["decoder_sparse_step"]
    return {
        "pattern": "*-" * (step - 1) + "*E",
        "num_layers": config["num_hidden_layers"] // step,
        "num_kv_heads": config["num_key_value_heads"],
        "qkv_bias": config["qkv_bias"],
        "moe": {
            "num_experts": config["num_experts"],
            "top_k": config["num_experts_per_tok"],
            "expert_size": config["moe_intermediate_size"],
            "shared_size": config["shared_expert_intermediate_size"],
            "shared_gate": True,
            "renormalize": config["norm_topk_prob"],
        },
    }


def qwen3_moe(config: Config) -> dict[str, Any]:
    assert config["decoder_sparse_step"] == 1 and not config["mlp_only_layers"]
    return {
        "pattern": "*E",
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "qk_norm": True,
        "moe": {
            # older files say num_experts
            "num_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "expert_size": config["moe_intermediate_size"],
            "renormalize": config["norm_topk_prob"],
        },
    }


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


FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}


def model_of(fixture: Fixture) -> ModelConfig:
    """The settings of the same model."""
    config = fixture.config
    return ModelConfig(**{**common(config), **FAMILIES[config["model_type"]](config)})


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
    read = Reader(fixture.weights)
    padding = ((0, model.padded_vocab - model.vocab_size), (0, 0))
    found = {"embedding.table": np.pad(read("model.embed_tokens.weight"), padding)}
    found |= {"head.table": np.pad(read("lm_head.weight"), padding)} if not model.tied_head else {}
    found["final_norm.scale"] = read("model.norm.weight")
    # a transformer's layer is two of ours
    attend = latent_layer if "kv_lora_rank" in fixture.config else attention_layer
    layers = [
        layer
        for number in range(fixture.config["num_hidden_layers"])
        for layer in (attend(read, number, model), mlp_layer(read, number, model))
    ]
    size = len(model.layout.period)
    for number in range(len(model.layout.leading)):
        for place in range(size):
            found |= {f"stack.leading.{number}.layers.{place}.{name}": one for name, one in layers.pop(0).items()}
    for place in range(size):
        for name in layers[place]:
            found[f"stack.periods.layers.{place}.{name}"] = np.stack([layer[name] for layer in layers[place::size]])
    assert not read.left, list(read.left)
    return found


def attention_layer(read: Reader, number: int, model: ModelConfig) -> Arrays:
    """Norm and attention."""
    layer, own = f"model.layers.{number}", f"model.layers.{number}.self_attn"
    found = {"norm.scale": read(f"{layer}.input_layernorm.weight")}
    output = read(f"{own}.o_proj.weight").T
    found["attention.output.kernel"] = output.reshape(model.num_heads, model.head_size, model.hidden_size)
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
        kernel = read(f"{own}.{theirs}_proj.weight").T
        found[f"attention.{ours}.kernel"] = kernel.reshape(model.hidden_size, -1, model.head_size)
        if read.has(f"{own}.{theirs}_proj.bias"):
            found[f"attention.{ours}.bias"] = read(f"{own}.{theirs}_proj.bias").reshape(-1, model.head_size)
    for ours, theirs in (("query", "q"), ("key", "k")) if model.qk_norm else ():
        found[f"attention.{ours}_norm.scale"] = read(f"{own}.{theirs}_norm.weight")
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
    mixtral = f"{layer}.block_sparse_moe"
    own = mixtral if read.has(f"{mixtral}.gate.weight") else f"{layer}.mlp"
    if not read.has(f"{own}.gate.weight"):
        return found | {f"mlp.{name}.kernel": kernel for name, kernel in mlp(read, own).items()}
    found["moe.router.kernel"] = read(f"{own}.gate.weight").T
    if read.has(f"{own}.gate.e_score_correction_bias"):
        found["moe.router.bias"] = read(f"{own}.gate.e_score_correction_bias")
    names = ("w1", "w3", "w2") if own == mixtral else ("gate_proj", "up_proj", "down_proj")
    experts = [mlp(read, f"{own}.experts.{expert}", names) for expert in range(model.moe.num_experts)]
    found |= {f"moe.{name}": np.stack([expert[name] for expert in experts]) for name in ("up", "down")}
    if model.moe.shared_size:
        shared = mlp(read, f"{own}.shared_expert" if model.moe.shared_gate else f"{own}.shared_experts")
        found |= {f"moe.shared.{name}.kernel": kernel for name, kernel in shared.items()}
    if model.moe.shared_gate:
        found["moe.shared_gate"] = read(f"{own}.shared_expert_gate.weight")[0]
    return found


def mlp(read: Reader, own: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Arrays:
    """Gate and up in one, and down."""
    gate, up, down = (read(f"{own}.{name}.weight").T for name in names)
    return {"up": np.stack([gate, up], 1), "down": down}

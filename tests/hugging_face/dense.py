"""Decoders of many families of Hugging Face transformers as Jaxtron's, by reshaping alone: all but Llama's names.

What each family adds is an option of a decoder; files differ in names, and in how queries, keys and values lie.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtron.models.decoder.config import ModelConfig

Config = dict[str, Any]
Arrays = dict[str, np.ndarray]
GELU = {
    **{"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
    **{"silu": "swiglu"},
}
BY_MEAN = {"norm": "layer_norm", "bias": True}
BY_SQUARE = {"norm": "rms_norm", "bias": False}


def stretch(rope: Config) -> Config | None:
    """A rule of stretching in the settings' words."""
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        factors = {"short_factors": rope["short_factor"], "long_factors": rope["long_factor"]}
        return {"kind": "longrope", "original_length": original, "factor": 64 / original, **factors}
    assert rope["rope_type"] == "default"
    return None


def rotary(rope: Config) -> Config:
    """Positions by rotation, of all layers alike."""
    fraction = rope.get("partial_rotary_factor", 1.0)
    return {"base": rope["rope_theta"], "fraction": fraction, "scaling": stretch(rope)}


def gpt_neox(config: Config) -> Config:
    return {"pattern": "(*-)", "branch_norms": True, "norm_epsilon": config["layer_norm_eps"], **BY_MEAN}


def opt(config: Config) -> Config:
    return {"position": "learned", "max_positions": config["max_position_embeddings"], **BY_MEAN}


def bloom(config: Config) -> Config:
    return {"position": "alibi", "embedding_norm": True, "activation": "gelu_tanh", **BY_MEAN}


def falcon(config: Config) -> Config:
    is_new = config["new_decoder_architecture"]
    biases = {"norm": "layer_norm", "bias": config["bias"], "norm_bias": True}
    return {
        "pattern": "(*-)",
        "branch_norms": is_new,
        "num_kv_heads": config["num_kv_heads"] if is_new else 1,
        "mlp_size": config["ffn_hidden_size"],
        **biases,
    }


def gptj(config: Config) -> Config:
    fraction = config["rotary_dim"] * config["n_head"] / config["n_embd"]
    biases = {"qkv_bias": False, "attention_output_bias": False, "head_bias": True}
    return {"pattern": "(*-)", "rotary": {"fraction": fraction}, **BY_MEAN, **biases}


def cohere(config: Config) -> Config:
    own = {"logit_scale": config["logit_scale"], "qk_norm": "each_head", "pattern": "(*-)"}
    return {"norm": "layer_norm", "bias": False, **own}


SETTINGS: dict[str, Callable[[Config], Config]] = {
    "gpt_neox": gpt_neox,
    "opt": opt,
    "bloom": bloom,
    "falcon": falcon,
    "gptj": gptj,
    "phi3": lambda config: BY_SQUARE,
    "cohere": cohere,
}


def settings_of(config: Config) -> Config:
    """Those of a file's model."""

    def first(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if name in config), default)

    found = {
        "num_layers": first("num_hidden_layers", "n_layer"),
        "hidden_size": first("hidden_size", "n_embd"),
        "num_heads": first("num_attention_heads", "n_head"),
        "num_kv_heads": first("num_key_value_heads"),
        "head_dim": first("head_dim"),
        "mlp_size": first("intermediate_size", "ffn_dim", "n_inner"),
        "vocab_size": config["vocab_size"],
        "vocab_multiple": 16,
        "activation": GELU[first("hidden_act", "activation_function", "activation", default="gelu_pytorch_tanh")],
        "norm_epsilon": first("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", default=1e-5),
        "position": "rotary",
        "tied_head": config["tie_word_embeddings"],
    }
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:
        found["rotary"] = rotary(rope)
    return found | SETTINGS[config["model_type"]](config)


# by family: what begins a layer's names, the embedding's and the last norm's, and names of norms by what they are here
NAMES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    ),
    "opt": (
        "model.decoder.layers.{}.",
        "model.decoder.embed_tokens",
        "model.decoder.final_layer_norm",
        {"*norm": "self_attn_layer_norm", "-norm": "final_layer_norm"},
    ),
    "bloom": (
        "transformer.h.{}.",
        "transformer.word_embeddings",
        "transformer.ln_f",
        {"*norm": "input_layernorm", "-norm": "post_attention_layernorm"},
    ),
    "falcon": (
        "transformer.h.{}.",
        "transformer.word_embeddings",
        "transformer.ln_f",
        {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp", "norm": "input_layernorm"},
    ),
    "gptj": ("transformer.h.{}.", "transformer.wte", "transformer.ln_f", {"norm": "ln_1"}),
    "cohere": ("model.layers.{}.", "model.embed_tokens", "model.norm", {"norm": "input_layernorm"}),
}
LLAMA = {"*norm": "input_layernorm", "-norm": "post_attention_layernorm"}
PLAIN_MLPS = (("dense_h_to_4h", "dense_4h_to_h"), ("fc_in", "fc_out"), ("fc1", "fc2"))


class Weights:
    """A file's by name, each to be taken once."""

    def __init__(self, arrays: Arrays) -> None:
        self.left = dict(arrays)

    def take(self, ours: str, theirs: str, shape: tuple[int, ...] = (-1,)) -> Arrays:
        """A matrix, or a norm's scale, and a bias where there is one; outputs of a matrix are of this shape."""
        array, found = self.left.pop(f"{theirs}.weight"), {}
        if array.ndim == 2 and not ours.endswith("norm"):
            found[f"{ours}.kernel"] = array.T.reshape(array.shape[1], *shape)
        else:
            found[f"{ours}.scale"] = array
        bias = self.left.pop(f"{theirs}.bias", None)
        return found if bias is None else found | {f"{ours}.bias": bias.reshape(shape)}

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.left


def parameters(arrays: Arrays, config: Config, model: ModelConfig) -> tuple[Arrays, list[Arrays]]:
    """Those outside of layers, and of each layer of the pattern in order."""
    read, family = Weights(arrays), config["model_type"]
    default = ("model.layers.{}.", "model.embed_tokens", "model.norm", LLAMA)
    prefix, table, last, norms = NAMES.get(family, default)
    padding = ((0, model.padded_vocab - model.vocab_size), (0, 0))
    outer = {"embedding.table": np.pad(read.left.pop(f"{table}.weight"), padding), **read.take("final_norm", last)}
    if not model.tied_head:
        (head,) = (name for name in ("lm_head", "embed_out") if read.has(name))
        outer["head.table"] = np.pad(read.left.pop(f"{head}.weight"), padding)
        if model.head_bias:
            outer["head_bias"] = np.pad(read.left.pop(f"{head}.bias"), padding[0])
    if model.embedding_norm:
        outer |= read.take("embedding_norm", f"{table}_layernorm")
    if family == "opt":
        # the first two are of no token
        outer["embedding.positions"] = read.left.pop("model.decoder.embed_positions.weight")[2:]
    layers: list[Arrays] = []
    for place, branch in enumerate(model.layout.layers):
        own, found = prefix.format(place if len(branch) > 1 else place // 2), {}
        for ours, theirs in norms.items():
            symbol = ours[0] if ours[0] in "*-" else {"a": "*", "m": "-", "n": branch[0]}[ours[0]]
            is_here = symbol in branch or (symbol == "*" and "W" in branch)
            if is_here and read.has(own + theirs):
                found |= read.take(ours.lstrip("*-"), own + theirs)
        if branch != ("-",):
            found |= attention(read, own, model, family)
        if "-" in branch:
            found |= mlp(read, own, model)
        layers.append(found)
    assert not read.left, list(read.left)
    return outer, layers


def attention(read: Weights, own: str, model: ModelConfig, family: str) -> Arrays:
    """Projections from however they lie, and back, and norms; neighbours that are rotated become halves."""
    names = ("self_attn", "self_attention", "attention", "attn")
    name = next(one for one in names if any(key.startswith(f"{own}{one}.") for key in read.left))
    own, heads, keys, size = f"{own}{name}.", model.num_heads, model.kv_heads, model.head_size
    found: Arrays = {}
    if family == "phi3":
        split = np.split(read.left.pop(f"{own}qkv_proj.weight"), np.cumsum([heads * size, keys * size]))
        for one, rows in zip("qkv", split, strict=True):
            read.left[f"{own}{one}_proj.weight"] = rows
    elif read.has(f"{own}query_key_value"):
        for kind in ("weight", "bias"):
            rows = read.left.pop(f"{own}query_key_value.{kind}", None)
            if rows is None:
                continue
            # of falcon by group of heads that share a key and a value
            by_group = rows.reshape(keys, heads // keys + 2, size, *rows.shape[1:])
            for one, part in zip("qkv", (by_group[:, :-2], by_group[:, -2], by_group[:, -1]), strict=True):
                read.left[f"{own}{one}_proj.{kind}"] = part.reshape(-1, *rows.shape[1:])
    for ours, one in (("query", "q"), ("key", "k"), ("value", "v")):
        found |= read.take(f"attention.{ours}", f"{own}{one}_proj", (-1, size))
        if ours != "value" and model.qk_norm:
            found |= read.take(f"attention.{ours}_norm", f"{own}{one}_norm")
            scale = found[f"attention.{ours}_norm.scale"]
            found[f"attention.{ours}_norm.scale"] = scale if model.qk_norm is True else scale.reshape(-1, size)
    if family in ("gptj", "cohere"):
        rotated = model.rotary.dimensions(size)
        order = np.concatenate([np.arange(rotated).reshape(-1, 2).T.reshape(-1), np.arange(rotated, size)])
        for key in [key for key in found if "query" in key or "key" in key]:
            found[key] = found[key][..., order]
    (back,) = (one for one in ("o_proj", "out_proj", "dense") if read.has(own + one))
    output = read.take("attention.output", own + back)
    output["attention.output.kernel"] = output["attention.output.kernel"].reshape(heads, size, -1)
    return found | output


def mlp(read: Weights, own: str, model: ModelConfig) -> Arrays:
    """Of two matrices, or gated: gate and up in one."""
    inner = own if read.has(f"{own}fc1") else f"{own}mlp."
    if read.has(f"{inner}gate_up_proj"):
        gate, up = np.split(read.left.pop(f"{inner}gate_up_proj.weight"), 2)
        read.left |= {f"{inner}gate_proj.weight": gate, f"{inner}up_proj.weight": up}
    if read.has(f"{inner}gate_proj"):
        gate, up = (read.left.pop(f"{inner}{name}_proj.weight").T for name in ("gate", "up"))
        return {"mlp.up.kernel": np.stack([gate, up], 1), **read.take("mlp.down", f"{inner}down_proj")}
    up, down = next(names for names in PLAIN_MLPS if read.has(inner + names[0]))
    return read.take("mlp.up", inner + up) | read.take("mlp.down", inner + down)

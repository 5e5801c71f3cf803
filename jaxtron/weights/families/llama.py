"""Llama and what is like it: Mistral, Qwen2, Qwen3, Nemotron."""

from dataclasses import replace
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor, TensorTable

MOST_LAYERS = 2**16
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
PLAIN = {
    "relu2": "squared_relu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SLIDING, FULL = "sliding_attention", "full_attention"


def norm_rows(ours: str, theirs: str, dims: str = "E") -> tuple[Tensor, ...]:
    """A norm's scale and bias."""
    return tuple(
        Tensor(f"{ours}.{own}", dims, f"{theirs}.{name}", dims) for own, name in (("scale", "weight"), ("bias", "bias"))
    )


def linear_rows(ours: str, theirs: str, dims: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """A matrix and its bias, by the letters of inputs and outputs."""
    inputs, outputs = dims
    kernel = Tensor(f"{ours}.kernel", " ".join(inputs + outputs), f"{theirs}.weight", f"{outputs} {inputs}")
    return kernel, Tensor(f"{ours}.bias", " ".join(outputs), f"{theirs}.bias", outputs)


def projection(ours: str, theirs: str, heads: str) -> tuple[Tensor, ...]:
    """From the stream to heads."""
    kernel = Tensor(f"attention.{ours}.kernel", f"E {heads} D", f"self_attn.{theirs}.weight", f"{heads}D E")
    return (kernel, Tensor(f"attention.{ours}.bias", f"{heads} D", f"self_attn.{theirs}.bias", f"{heads}D"))


ATTENTION = (
    *norm_rows("norm", "input_layernorm"),
    *projection("query", "q_proj", "H"),
    *projection("key", "k_proj", "K"),
    *projection("value", "v_proj", "K"),
    *norm_rows("attention.query_norm", "self_attn.q_norm", "D"),
    *norm_rows("attention.key_norm", "self_attn.k_norm", "D"),
    Tensor("attention.output.kernel", "H D E", "self_attn.o_proj.weight", "E HD"),
    Tensor("attention.output.bias", "E", "self_attn.o_proj.bias", "E"),
)
DOWN = (
    *norm_rows("norm", "post_attention_layernorm"),
    Tensor("mlp.down.kernel", "F E", "mlp.down_proj.weight", "E F"),
    Tensor("mlp.down.bias", "E", "mlp.down_proj.bias", "E"),
)
# the gate comes first
GATED_MLP = (
    *DOWN,
    Tensor("mlp.up.kernel", "E G F", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "F E"),
    Tensor("mlp.up.bias", "G F", ("mlp.gate_proj.bias", "mlp.up_proj.bias"), "F"),
)
PLAIN_MLP = (
    *DOWN,
    Tensor("mlp.up.kernel", "E F", "mlp.up_proj.weight", "F E"),
    Tensor("mlp.up.bias", "F", "mlp.up_proj.bias", "F"),
)
TENSORS = TensorTable(
    outer=(
        Tensor("embedding.table", "V E", "model.embed_tokens.weight", "V E"),
        *norm_rows("final_norm", "model.norm"),
        Tensor("head.table", "V E", "lm_head.weight", "V E"),
    ),
    branches={"*": ATTENTION, "W": ATTENTION, "-": GATED_MLP},
    layer="model.layers.{}.",
    ignored=("rotary_emb.inv_freq",),
)


def common_keys(
    *,
    vocab: int,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int | None = None,
    is_tied: bool = False,
    initial_std: float = 0.02,
) -> tuple[Key, ...]:
    """The keys that all have, with the sizes of the family's class."""
    return (
        Key("vocab_size", "vocab_size", vocab),
        Key("hidden_size", "hidden_size", hidden),
        Key("intermediate_size", "mlp_size", mlp),
        Key("num_hidden_layers", "num_layers", layers),
        Key("num_attention_heads", "num_heads", heads),
        Key("num_key_value_heads", "num_kv_heads", kv_heads),
        Key("head_dim", "head_dim", head_dim),
        Key("initializer_range", "initial_std", initial_std),
        Key("tie_word_embeddings", "tied_head", is_tied),
    )


def read_biases(file: ConfigFile) -> None:
    """Of attention, its projection back too, and of the MLP."""
    attention, mlp = file.flag("attention_bias", False), file.flag("mlp_bias", False)
    file.set("bias", attention, "attention_bias")
    if mlp != attention:
        file.set("mlp_bias", mlp, "mlp_bias")


def write_biases(model: ModelConfig) -> dict[str, Any]:
    """Of both."""
    return {"attention_bias": model.has_qkv_bias, "mlp_bias": model.has_mlp_bias}


def read_window(file: ConfigFile, default: int | None = 4096) -> None:
    """Mistral's: every layer has it, or none; `default` is the class's."""
    if file.get("sliding_window", default) is not None:
        file.set("pattern", "W-", "sliding_window")
        file.set("attention.window", file.whole("sliding_window", default or 0), "sliding_window")


def write_window(model: ModelConfig) -> dict[str, Any]:
    """Null where there is none."""
    return {"sliding_window": model.attention.window}


def read_windows(file: ConfigFile, layers: int = 32) -> None:
    """Qwen's."""
    set_kinds(file, kinds_of_qwen(file, layers))


def kinds_of_qwen(file: ConfigFile, layers: int) -> list[str]:
    """The last layers have a window where it is used at all, or those that are named."""
    count = file.whole("num_hidden_layers", layers, MOST_LAYERS)
    used, first = file.flag("use_sliding_window", False), file.whole("max_window_layers", 28)
    window = file.get("sliding_window", 4096) if used else None
    file.get("sliding_window")
    usual = [SLIDING if window is not None and number >= first else FULL for number in range(count)]
    kinds = kinds_of_layers(file, usual)
    if SLIDING in kinds and window is None:
        file.refuse("layer_types", f"{SLIDING} needs use_sliding_window and a sliding_window")
    return kinds


def kinds_of_layers(file: ConfigFile, usual: list[str]) -> list[str]:
    """What each layer attends to; `usual` is the class's where the file does not say it."""
    kinds = file.get("layer_types")
    kinds = usual if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != len(usual) or not all(kind in (SLIDING, FULL) for kind in kinds):
        file.refuse("layer_types", f"it must be a list of {len(usual):,} of {FULL} and {SLIDING}")
    return kinds


def set_kinds(file: ConfigFile, kinds: list[str], mlp: str = "-") -> None:
    """The pattern, of attention and MLPs or experts, and the window where a layer has one."""
    if SLIDING in kinds:
        file.set("attention.window", file.whole("sliding_window", 4096), "sliding_window")
    if SLIDING not in kinds or FULL not in kinds:
        file.set("pattern", f"W{mlp}" if SLIDING in kinds else f"*{mlp}", "layer_types")
        return
    file.set("pattern", "".join(f"W{mlp}" if kind == SLIDING else f"*{mlp}" for kind in kinds), "layer_types")
    file.set("num_layers", 1, "layer_types")


def set_pattern(file: ConfigFile, layers: list[str], key: str) -> None:
    """The pattern of these layers, of which there are some, as few of them as repeat."""
    count = len(layers)
    size = next(size for size in range(1, count + 1) if count % size == 0 and layers[:size] * (count // size) == layers)
    file.set("pattern", "".join(layers[:size]), key)
    file.set("num_layers", count // size, key)


def kinds_of_model(model: ModelConfig) -> list[str]:
    """The same of a model's layers."""
    return [SLIDING if branch == ("W",) else FULL for branch in model.layout.layers[::2]]


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """By the kind of each layer; of transformers before 4.52 also by how many come before the first with a window."""
    kinds = kinds_of_model(model)
    if SLIDING not in kinds:
        return {"use_sliding_window": False}
    window = {"use_sliding_window": True, "sliding_window": model.attention.window}
    return {**window, "max_window_layers": kinds.index(SLIDING), "layer_types": kinds}


BIASES, WINDOW, WINDOWS = (
    Rule(read_biases, write_biases),
    Rule(read_window, write_window),
    Rule(read_windows, write_windows),
)
RMS = {"norm": "rms_norm", "bias": False}
RMS_KEYS = (Key("rms_norm_eps", "norm_epsilon", 1e-6), Key("hidden_act", "activation", "silu", GATED))

LLAMA = HubFamily(
    architecture="LlamaForCausalLM",
    keys=(*common_keys(vocab=32000, hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=None), *RMS_KEYS),
    tensors=TENSORS,
    constants=RMS,
    further=(BIASES, rotary()),
)
MISTRAL = HubFamily(
    architecture="MistralForCausalLM",
    keys=(*common_keys(vocab=32000, hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8), *RMS_KEYS),
    tensors=TENSORS,
    constants=RMS,
    only={"attention_bias": False, "mlp_bias": False},
    further=(WINDOW, rotary(positions=131072)),
)
QWEN2 = HubFamily(
    architecture="Qwen2ForCausalLM",
    keys=(*common_keys(vocab=151936, hidden=4096, mlp=22016, layers=32, heads=32, kv_heads=32), *RMS_KEYS),
    tensors=TENSORS,
    constants={**RMS, "qkv_bias": True},
    further=(WINDOWS, rotary(positions=32768)),
)
QWEN3 = HubFamily(
    architecture="Qwen3ForCausalLM",
    keys=tuple(replace(key, default=128) if key.theirs == "head_dim" else key for key in QWEN2.keys),
    tensors=TENSORS,
    constants={**RMS, "qk_norm": True},
    only={"attention_bias": False},
    further=QWEN2.further,
)
NEMOTRON = HubFamily(
    architecture="NemotronForCausalLM",
    keys=(
        *common_keys(vocab=256000, hidden=6144, mlp=24576, layers=32, heads=48, kv_heads=None, initial_std=0.0134),
        Key("norm_eps", "norm_epsilon", 1e-5),
        Key("hidden_act", "activation", "relu2", PLAIN),
    ),
    tensors=replace(TENSORS, branches={"*": ATTENTION, "-": PLAIN_MLP}),
    constants={"norm": "layer_norm_1p", "norm_bias": True},
    further=(BIASES, rotary(fraction=0.5, positions=4096)),
)

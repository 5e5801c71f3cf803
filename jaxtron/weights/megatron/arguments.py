"""A run's arguments as Megatron-LM has them, and the settings of `model` that say the same, read strictly."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxtron.config import SettingsSource, UserError, shown
from jaxtron.weights.megatron.directory import Arguments, find_checkpoint, read_arguments
from jaxtron.weights.megatron.flags import ONLY, is_without_effect

# names that an argument had in other versions, newest first
ALIASES = {
    "norm_epsilon": "layernorm_epsilon norm_epsilon",
    "one_more": "layernorm_zero_centered_gamma apply_layernorm_1p",
    "tensor": "tensor_model_parallel_size model_parallel_size",
}
LISTED = "without_effect.txt"
LONGEST_LIST = 2**16
NORMS = ("LayerNorm", "RMSNorm")
POSITIONS = {"learned_absolute": "learned", "rope": "rotary", "none": "none"}
BALANCED = frozenset({"aux_loss", "seq_aux_loss", "global_aux_loss", "none"})


@dataclass(frozen=True)
class MeshSizes:
    """What of the arguments says how tensors lie in files."""

    tensor: int
    pipeline: int
    expert: int
    heads: int
    groups: int
    """Of queries that share a key."""
    dim: int
    """Of a head."""
    is_gated: bool
    adds_one: bool
    """Norms by the root mean square have their scale less 1 in the file."""


class ArgumentReader:
    """The arguments by name, and the settings that are found to say the same, each with its argument as its origin."""

    def __init__(self, arguments: Arguments) -> None:
        self.path = arguments.path
        self.settings = SettingsSource()
        self._values = arguments.values
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an argument, which is understood from now on; another where it is None or was not known then."""
        found = default
        for known in reversed(ALIASES.get(name, name).split()):
            self._read.add(known)
            value = self._values.get(known)
            found = found if value is None else value
        return found

    def name(self, name: str) -> str:
        """The name that the argument has in the file."""
        known = ALIASES.get(name, name).split()
        return next((one for one in known if self._values.get(one) is not None), known[0])

    def whole(self, name: str, default: int | None = None, least: int = 0) -> int:
        """The value of one that is a whole number."""
        value = self.get(name, default)
        if type(value) is not int or not least <= value < 2**31:
            self.refuse(name, f"it must be a whole number from {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The value of one that is a number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "it must be a number")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """The value of one that is true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            self.refuse(name, "it must be true or false")
        return value

    def word(self, name: str, default: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
        """The value of one that is a word of a list."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in known:
            self.refuse(name, f"only {', '.join(known)} are known here")
        return value

    def set(self, setting: str, value: Any, name: str) -> None:
        """The setting of this name, without `model.`, is this value: so says the argument."""
        self.settings.set(f"model.{setting}", value, f"{self.path} {self.name(name)}")

    def refuse(self, name: str, why: str) -> NoReturn:
        """`UserError` for the value of an argument."""
        name = self.name(name)
        raise UserError(f"{self.path} has {name} {_as_text(self._values.get(name))}: {why}")

    def check_rest(self, known: frozenset[str]) -> None:
        """`UserError` for an argument of another value than is understood, or that nobody asked for and is not off.

        `known` are names that the user says change nothing.
        """
        for name, values in ONLY.items():
            value = self._values.get(name)
            self._read.add(name)
            if not _is_off(value) and not any(type(value) is type(one) and value == one for one in values):
                self.refuse(name, f"only {' or '.join(_as_text(one) for one in values or (None,))} is known here")
        unknown = sorted(
            name
            for name, value in self._values.items()
            if name not in self._read | known and not is_without_effect(name) and not _is_off(value)
        )
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            self.refuse(
                unknown[0],
                f"that argument is not known here{more}, and it may change what the model computes; if it does not, "
                f"write its name on a line of {LISTED} beside the checkpoint",
            )


def megatron_settings(directory: Path) -> SettingsSource:
    """The settings of a checkpoint's model; `UserError` for what is not understood and may change what is computed.

    Without JAX, and without a look at weights.
    """
    checkpoint = find_checkpoint(directory)
    reader = ArgumentReader(read_arguments(checkpoint))
    sizes_of(reader)
    _read_layers(reader)
    _read_attention(reader)
    _read_positions(reader)
    reader.check_rest(_listed(checkpoint.directory) | _listed(directory))
    return reader.settings


def sizes_of(reader: ArgumentReader) -> MeshSizes:
    """What says how tensors lie."""
    heads = reader.whole("num_attention_heads", least=1)
    hidden = reader.whole("hidden_size", least=1)
    groups = heads
    if reader.flag("group_query_attention"):
        groups = reader.whole("num_query_groups", heads, least=1)
    # 1 where nothing was said
    reader.get("num_query_groups")
    tensor = reader.whole("tensor", 1, least=1)
    dim = reader.get("kv_channels")
    if dim is None and hidden % heads:
        reader.refuse("hidden_size", f"it is not a multiple of num_attention_heads {heads}")
    if heads % groups or groups % tensor:
        reader.refuse(
            "num_query_groups",
            f"it must divide num_attention_heads {heads}, and be a multiple of the tensor-parallel size {tensor}",
        )
    return MeshSizes(
        tensor=tensor,
        pipeline=reader.whole("pipeline_model_parallel_size", 1, least=1),
        expert=reader.whole("expert_model_parallel_size", 1, least=1),
        heads=heads,
        groups=groups,
        dim=hidden // heads if dim is None else reader.whole("kv_channels", least=1),
        is_gated=reader.flag("swiglu") or reader.flag("quick_geglu"),
        adds_one=reader.flag("one_more") and reader.get("normalization") == "RMSNorm",
    )


def _read_layers(reader: ArgumentReader) -> None:
    """Sizes, norms, biases, MLPs or experts, and the vocabulary."""
    reader.set("hidden_size", reader.whole("hidden_size", least=1), "hidden_size")
    mlp = reader.get("ffn_hidden_size")
    reader.set("mlp_size", 4 * reader.whole("hidden_size") if mlp is None else mlp, "ffn_hidden_size")
    padded, multiple = reader.whole("padded_vocab_size", least=1), reader.whole("make_vocab_size_divisible_by", 128, 1)
    # its padding has trained numbers too, and its loss sums over it
    reader.set("vocab_size", padded, "padded_vocab_size")
    reader.set("vocab_multiple", multiple if padded % multiple == 0 else 1, "make_vocab_size_divisible_by")
    reader.set(
        "tied_head", not reader.flag("untie_embeddings_and_output_weights"), "untie_embeddings_and_output_weights"
    )
    reader.set("initial_std", reader.number("init_method_std", 0.02), "init_method_std")
    reader.set("norm_epsilon", reader.number("norm_epsilon", 1e-5), "norm_epsilon")
    norm, bias = reader.word("normalization", "LayerNorm", NORMS), reader.flag("add_bias_linear", True)
    if norm == "RMSNorm":
        reader.set("norm", "rms_norm", "normalization")
    else:
        reader.set("norm", "layer_norm_1p" if reader.flag("one_more") else "layer_norm", "normalization")
        # its norms have biases where its linear layers have none, too
        reader.set("norm_bias", True, "normalization")
    reader.set("bias", bias, "add_bias_linear")
    reader.set("activation", _activation(reader), "bias_gelu_fusion")
    number = reader.whole("num_layers", least=1)
    if reader.get("num_experts") is None:
        kinds = ["-"] * number
    else:
        kinds = _read_experts(reader, number)
    _set_pattern(reader, kinds, _windows(reader, number))


def _activation(reader: ArgumentReader) -> str:
    names = ("swiglu", "quick_geglu", "squared_relu", "openai_gelu")
    given = [name for name in names if reader.flag(name)]
    fused = reader.flag("bias_gelu_fusion", True) and reader.flag("add_bias_linear", True)
    if len(given) > 1:
        reader.refuse(given[1], f"{given[0]} is true too")
    clamp, offset = reader.get("activation_func_clamp_value"), reader.number("glu_linear_offset", 0.0)
    if given == ["quick_geglu"]:
        if (clamp, offset) != (7.0, 1.0):
            reader.refuse("quick_geglu", "it is known with activation_func_clamp_value 7 and glu_linear_offset 1 alone")
        return "clamped_swiglu"
    for name, value, only in (("activation_func_clamp_value", clamp, None), ("glu_linear_offset", offset, 0.0)):
        if value != only:
            reader.refuse(name, "it is known with quick_geglu alone")
    if given:
        return {"swiglu": "swiglu", "squared_relu": "squared_relu", "openai_gelu": "gelu_tanh"}[given[0]]
    # the fused kernel computes the tanh form
    return "gelu_tanh" if fused else "gelu"


def _read_attention(reader: ArgumentReader) -> None:
    sizes = sizes_of(reader)
    reader.set("num_heads", sizes.heads, "num_attention_heads")
    reader.set("num_kv_heads", sizes.groups, "num_query_groups")
    reader.set("head_dim", sizes.dim, "kv_channels")
    reader.set("qk_norm", reader.flag("qk_layernorm"), "qk_layernorm")
    bias = reader.flag("add_bias_linear", True)
    added = reader.flag("add_qkv_bias")
    if added and not bias:
        reader.set("qkv_bias", True, "add_qkv_bias")
    sinks = reader.word("softmax_type", "vanilla", ("vanilla", "learnable"))
    reader.set("attention.sinks", sinks == "learnable", "softmax_type")


def _read_positions(reader: ArgumentReader) -> None:
    kind = reader.word("position_embedding_type", "learned_absolute", POSITIONS)
    # names of before
    if kind == "learned_absolute" and reader.flag("use_rotary_position_embeddings"):
        kind = "rope"
    if kind == "learned_absolute" and not reader.flag("add_position_embedding", True):
        kind = "none"
    reader.get("add_position_embedding")
    reader.get("use_rotary_position_embeddings")
    reader.set("position", POSITIONS[kind], "position_embedding_type")
    if kind == "learned_absolute":
        reader.set("max_positions", reader.whole("max_position_embeddings", least=1), "max_position_embeddings")
    rotates = kind == "rope"
    base, part = reader.number("rotary_base", 10000), reader.number("rotary_percent", 1.0)
    interleaved, factor = reader.flag("rotary_interleaved"), reader.get("rotary_seq_len_interpolation_factor")
    scales, by = reader.flag("use_rope_scaling"), reader.number("rope_scaling_factor", 8.0)
    reader.get("max_position_embeddings")
    if not rotates:
        return
    if interleaved:
        reader.refuse("rotary_interleaved", "pairs of neighbours are not known here, only those of halves")
    if factor not in (None, 1, 1.0):
        reader.refuse("rotary_seq_len_interpolation_factor", "positions that are divided are not known here")
    reader.set("rotary.base", base, "rotary_base")
    reader.set("rotary.fraction", part, "rotary_percent")
    if scales:
        rule = {"kind": "llama3", "factor": by, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0}
        reader.set("rotary.scaling", {**rule, "original_length": 8192}, "use_rope_scaling")


def _windows(reader: ArgumentReader, number: int) -> list[bool]:
    """Which layers attend in a window."""
    size, often = reader.get("window_size"), reader.get("window_attn_skip_freq")
    if size is None:
        return [False] * number
    if not isinstance(size, tuple | list) or len(size) != 2 or type(size[0]) is not int or size[0] < 0 or size[1] != 0:
        reader.refuse("window_size", "only windows of tokens before are known here, such as (127, 0)")
    # beside its own token
    reader.set("attention.window", size[0] + 1, "window_size")
    if often is None:
        return [True] * number
    if type(often) is int and often > 0:
        return [(layer + 1) % often != 0 for layer in range(number)]
    return [one == 1 for one in _ones(reader, "window_attn_skip_freq", often, number)]


def _ones(reader: ArgumentReader, name: str, value: Any, number: int) -> list[int]:
    """A list of 0 and 1 for each layer, which may be written as a sum of products of lists."""
    if isinstance(value, str):
        value = _multiplied(value, number)
    if not isinstance(value, list | tuple) or len(value) != number or not all(one in (0, 1) for one in value):
        reader.refuse(name, f"it must be a number, or a list of {number:,} of 0 and 1")
    return list(value)


def _multiplied(text: str, number: int) -> list[int] | int | None:
    """Such as `([0]*1+[1]*3)*2`, which is never evaluated; None where it is something else, or too long."""
    if text.isdecimal():
        return int(text) if len(text) < 6 else None
    inner = r"\[[01](?:,[01])*\](?:\*\d{1,5})?"
    found = re.fullmatch(rf"\(?({inner}(?:\+{inner})*)\)?(?:\*(\d{{1,5}}))?", text.replace(" ", ""))
    if found is None:
        return None
    values: list[int] = []
    for part in found[1].split("+"):
        listed, _, times = part.partition("*")
        count = int(times or 1)
        values += [int(one) for one in listed[1:-1].split(",")] * min(count, number + 1)
    return values * min(int(found[2] or 1), number + 1)


def _read_experts(reader: ArgumentReader, number: int) -> list[str]:
    """Settings of experts; the symbol of each layer's second half."""
    count = reader.whole("num_experts", least=1)
    often = reader.get("moe_layer_freq", 1)
    often = _multiplied(often, number) if isinstance(often, str) else often
    if type(often) is int and often > 0:
        kinds = ["E" if layer % often == 0 else "-" for layer in range(number)]
    else:
        kinds = ["E" if one else "-" for one in _ones(reader, "moe_layer_freq", often, number)]
    if reader.flag("add_bias_linear", True):
        reader.refuse("add_bias_linear", "biases of experts are not known here")
    reader.set("moe.num_experts", count, "num_experts")
    top = reader.whole("moe_router_topk", 2, least=1)
    reader.set("moe.top_k", top, "moe_router_topk")
    width = reader.get("moe_ffn_hidden_size")
    if width is None:
        width = reader.whole("ffn_hidden_size", 4 * reader.whole("hidden_size"))
    reader.set("moe.expert_size", width, "moe_ffn_hidden_size")
    reader.set(
        "moe.shared_size", reader.whole("moe_shared_expert_intermediate_size", 0), "moe_shared_expert_intermediate_size"
    )
    reader.set("moe.shared_gate", reader.flag("moe_shared_expert_gate"), "moe_shared_expert_gate")
    score = reader.word("moe_router_score_function", "softmax", ("softmax", "sigmoid"))
    before = reader.flag("moe_router_pre_softmax")
    if score == "sigmoid":
        reader.set("moe.scores", "sigmoid", "moe_router_score_function")
        # a single one keeps its own
        reader.set("moe.renormalize", top > 1, "moe_router_topk")
    else:
        reader.set("moe.scores", "softmax" if before else "topk_softmax", "moe_router_pre_softmax")
    reader.set("moe.scaling", reader.number("moe_router_topk_scaling_factor", 1.0), "moe_router_topk_scaling_factor")
    if reader.flag("moe_router_enable_expert_bias"):
        rate = reader.number("moe_router_bias_update_rate", 1e-3)
        if rate <= 0:
            reader.refuse("moe_router_bias_update_rate", "a selection bias that stays as it is is not known here")
        reader.set("moe.bias_rate", rate, "moe_router_bias_update_rate")
    groups = reader.get("moe_router_num_groups")
    if groups is not None and groups != 1:
        chosen = reader.whole("moe_router_group_topk", least=1)
        best = top // chosen
        if best not in (1, 2):
            reader.refuse(
                "moe_router_group_topk", f"groups ranked by the sum of their {best} largest are not known here"
            )
        reader.set("moe.groups", reader.whole("moe_router_num_groups", least=1), "moe_router_num_groups")
        reader.set("moe.top_groups", chosen, "moe_router_group_topk")
        reader.set("moe.group_score", "largest" if best == 1 else "two_largest", "moe_router_group_topk")
    balance = reader.get("moe_router_load_balancing_type", "aux_loss")
    if not set(balance if isinstance(balance, list | tuple) else [balance]) <= BALANCED:
        reader.refuse("moe_router_load_balancing_type", "experts chosen by such a rule are not known here")
    return kinds


def _set_pattern(reader: ArgumentReader, kinds: list[str], windows: list[bool]) -> None:
    layers = [("W" if window else "*") + kind for window, kind in zip(windows, kinds, strict=True)]
    dense = next((place for place, kind in enumerate(kinds) if kind == "E"), 0)
    if dense and len({*layers[:dense], layers[-1].replace("E", "-")}) == 1 == len(set(layers[dense:])):
        reader.set("pattern", layers[-1], "moe_layer_freq")
        reader.set("moe.leading_dense", dense, "moe_layer_freq")
    elif len(set(layers)) == 1:
        reader.set("pattern", layers[0], "num_layers")
    else:
        reader.set("pattern", "".join(layers), "num_layers")
        reader.set("num_layers", 1, "num_layers")
        return
    reader.set("num_layers", len(layers), "num_layers")


def _listed(directory: Path) -> frozenset[str]:
    """Names of arguments that a user says change nothing."""
    path = directory / LISTED
    try:
        return frozenset(path.read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _is_off(value: Any) -> bool:
    """Whether an argument is one of a thing that is not there."""
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value)


def _as_text(value: Any) -> str:
    """A value for an error line; what is no number, word or list of them by what it is."""
    plain = str | int | float | bool | None
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, plain):
        return str(value)
    if isinstance(value, list | tuple) and all(isinstance(one, plain) for one in value):
        return shown(" ".join(map(str, value)))
    return shown(getattr(value, "name", type(value).__name__))

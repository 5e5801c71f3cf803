"""Every dotted name that a file or a flag can set, from the configuration's own types."""

import difflib
import enum
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jaxtron.config.base import Config
from jaxtron.config.meanings import meanings


@dataclass(frozen=True)
class Setting:
    """One dotted name that a file or a flag can set: a value, or a whole section (then every member is a `Config`)."""

    name: str
    members: tuple[Any, ...]
    default: Any
    owner: type[Config]
    """Whose field it is."""
    bounds: str

    @property
    def meaning(self) -> str:
        """What it says of itself."""
        return meanings(self.owner)[self.name.rpartition(".")[2]]

    @property
    def is_section(self) -> bool:
        return all(is_config(member) for member in self.members)

    @property
    def scalars(self) -> tuple[Any, ...]:
        """The members that are neither none nor a sequence."""
        return tuple(m for m in self.members if m is not type(None) and not is_sequence_type(m))

    @property
    def is_sequence(self) -> bool:
        return any(is_sequence_type(member) for member in self.members)

    @property
    def has_optional_items(self) -> bool:
        """Whether it is a sequence with items that can be none."""
        return any(type(None) in _element_members(member) for member in self.members)

    @property
    def type_text(self) -> str:
        """Its type in words: `int >= 1 | none`, `adamw | sgd`, `[float, float]`."""
        return " | ".join(_describe(member, self.bounds) for member in self.members)

    @property
    def is_text(self) -> bool:
        """Whether a flag's words are taken as they stand, so that `--run.name 7` is a name."""
        pool = self.scalars or tuple(m for s in self.members for m in _element_members(s))
        return bool(pool) and all(_is_text(member) for member in pool)


def settings(config_type: type[Config]) -> dict[str, Setting]:
    """Every dotted name of `config_type` in order, sections before their contents."""
    found: dict[str, Setting] = {}
    for setting in _walk(config_type, "", PydanticUndefined):
        if setting.name in found:
            # alternatives of a union share this name: it takes what either takes
            first = found[setting.name]
            members = tuple(dict.fromkeys(first.members + setting.members))
            setting = Setting(first.name, members, first.default, first.owner, first.bounds)
        found[setting.name] = setting
    return found


def _walk(config_type: type[Config], prefix: str, instance: Any) -> Iterator[Setting]:
    for key, info in config_type.model_fields.items():
        members = _members(info.annotation)
        if isinstance(instance, config_type):
            default = getattr(instance, key)
        else:
            default = info.get_default(call_default_factory=True, validated_data={})
        yield Setting(prefix + key, members, default, config_type, _bounds(info))
        for member in members:
            if is_config(member):
                yield from _walk(member, f"{prefix}{key}.", default)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a (nested, annotated) union; any other type is its own single one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(dict.fromkeys(m for part in get_args(annotation) for m in _members(part)))
    return (annotation,)


def _element_members(annotation: Any) -> tuple[Any, ...]:
    if not is_sequence_type(annotation):
        return ()
    return tuple(m for part in get_args(annotation) if part is not Ellipsis for m in _members(part))


def is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def is_sequence_type(annotation: Any) -> bool:
    return (get_origin(annotation) or annotation) in (tuple, list, set, frozenset, Sequence)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal or an Enum, else nothing."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return tuple(member.value for member in annotation)
    return ()


def _is_text(annotation: Any) -> bool:
    choices = choices_of(annotation)
    if choices:
        return all(isinstance(choice, str) for choice in choices)
    return isinstance(annotation, type) and issubclass(annotation, (str, Path))


def _describe(annotation: Any, bounds: str = "") -> str:
    if choices := choices_of(annotation):
        return " | ".join(str(choice) for choice in choices)
    if is_sequence_type(annotation):
        parts = ["..." if p is Ellipsis else " | ".join(map(_describe, _members(p))) for p in get_args(annotation)]
        return f"[{', '.join(parts)}]"
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        return f"{{{_describe(key)}: {_describe(value)}}}"
    if is_config(annotation):
        return "{" + ", ".join([*list(annotation.model_fields)[:3], "..."][: len(annotation.model_fields)]) + "}"
    names = {type(None): "none", bool: "true | false", str: "text", Path: "path"}
    name = names.get(annotation) or getattr(annotation, "__name__", str(annotation))
    return name + bounds if annotation in (int, float) else name


def _bounds(info: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f"{s} {getattr(m, k)}" for m in info.metadata for k, s in signs.items() if hasattr(m, k)]
    return " " + ", ".join(found) if found else ""


# what other programs call a setting, by last words: ours comes first where both are known
OTHER_WORDS = {
    "batch": "global_batch",
    "batch_size": "global_batch",
    "global_batch_size": "global_batch",
    "micro_batch_size": "microbatches",
    "gradient_accumulation_steps": "microbatches",
    "seq_len": "sequence_length",
    "seq_length": "sequence_length",
    "max_seq_len": "sequence_length",
    "max_steps": "steps",
    "iterations": "steps",
    "train_iters": "steps",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "n_layers": "num_layers",
    "intermediate_size": "mlp_size",
    "ffn_hidden_size": "mlp_size",
    "n_routed_experts": "num_experts",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_router_topk": "top_k",
    "moe_intermediate_size": "expert_size",
    "moe_ffn_hidden_size": "expert_size",
    "shared_expert_intermediate_size": "shared_size",
    "first_k_dense_replace": "leading_dense",
    "moe_layer_freq": "leading_dense",
    "n_group": "groups",
    "topk_group": "top_groups",
    "norm_topk_prob": "renormalize",
    "routed_scaling_factor": "scaling",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "d_state": "state_size",
    "d_conv": "conv_width",
    "time_step_limit": "dt_limit",
    "num_k_heads": "linear_num_key_heads",
    "num_v_heads": "linear_num_value_heads",
    "hybrid_attention_ratio": "hybrid",
    "hybrid_mlp_ratio": "hybrid",
    "overlap_moe_expert_parallel_comm": "overlap",
    "expert_parallel": "expert",
    "output_dir": "directory",
    "tensor_parallel": "tensor",
    "pipeline_parallel": "pipe",
    "minimum": "least",
    "maximum": "most",
    "threshold": "similarity",
    "json-key": "text_field",
}


def nearest(name: str, known: dict[str, Setting]) -> str:
    """`; did you mean mesh.tensor?`: by what others call it, the same last word or its initials, then by likeness."""
    last = name.rpartition(".")[2]
    meant = [other for other in known if other.rpartition(".")[2] == OTHER_WORDS.get(last)]
    if meant:
        return f"; did you mean {max(meant, key=lambda other: difflib.SequenceMatcher(None, other, name).ratio())}?"
    names = [other for other in known if not name.startswith(f"{other}.")]
    ends = {other.rpartition(".")[2]: other for other in reversed(names)}
    same = [other for other in names if last in _abbreviations(other)]
    near = (
        difflib.get_close_matches(name, same, n=1, cutoff=0.0)
        or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        or [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.6)]
    )
    return f"; did you mean {near[0]}?" if near else "; --help lists the settings"


def _abbreviations(name: str) -> tuple[str, str]:
    """A setting's last word, and its initials: `learning_rate` and `lr`."""
    last = name.rpartition(".")[2]
    return last, "".join(word[:1] for word in last.split("_"))

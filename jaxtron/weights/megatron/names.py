"""The names that a tensor has in Megatron-LM's checkpoints, past and present, as one: those of the table.

Layers have their numbers in the whole model, norms are apart from the linear layers behind them, and the experts of a
layer are one tensor.
"""

import re
from dataclasses import dataclass
from typing import Literal

LAYERS = "decoder.layers."
NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# of Megatron-LM's own transformer before its core, by part of a name
OLD = (
    (re.compile(r"^language_model\.embedding\."), "embedding."),
    (re.compile(r"^language_model\.(encoder|transformer)\.(layers\.|final_)"), r"decoder.\2"),
    (re.compile(r"^language_model\.output_layer\."), "output_layer."),
    (re.compile(r"^word_embeddings_for_head\."), "output_layer."),
    (re.compile(r"\.final_norm\."), ".final_layernorm."),
    (re.compile(r"\.input_norm\."), ".input_layernorm."),
    (re.compile(r"\.post_attention_(layer)?norm\."), ".pre_mlp_layernorm."),
    (re.compile(r"(\.layers\.\d+)\.attention\."), r"\1.self_attention."),
    (re.compile(r"\.self_attention\.query_key_value\."), ".self_attention.linear_qkv."),
    (re.compile(r"\.self_attention\.dense\."), ".self_attention.linear_proj."),
    (re.compile(r"\.dense_h_to_4h\."), ".linear_fc1."),
    (re.compile(r"\.dense_4h_to_h\."), ".linear_fc2."),
)
# Transformer Engine has a norm in the linear layer behind it
FUSED = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r".input_layernorm.\1"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r".pre_mlp_layernorm.\1"),
)
EXPERT = (
    # a tensor of each expert, in one module or in modules of their own
    re.compile(r"(?P<before>.*\.mlp\.experts\.)(?P<matrix>linear_fc[12])\.(?P<kind>weight|bias)(?P<number>\d+)"),
    re.compile(
        r"(?P<before>.*\.mlp\.experts\.)(?:local_experts|experts)\.(?P<number>\d+)\.(?P<matrix>linear_fc[12])\."
        r"(?P<kind>weight|bias)"
    ),
)
ALL_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)experts\.(linear_fc[12]\.(?:weight|bias))")
HALF = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])")
# what is no parameter: states of optimizers and random numbers, scales of 8-bit numbers, tables of rotations
WITHOUT_WEIGHTS = re.compile(
    r"(optimizer|chained_\d+|rng_state|rerun_state|opt_param_scheduler|common_state|iteration|args)([./_].*)?$"
    r"|(.*\.)?(_extra_state(/.*)?|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq|local_tokens_per_expert)$"
)
Joined = Literal["rows", "halves", "columns", "same"]


@dataclass(frozen=True)
class Name:
    """A tensor's name, that of its layer with the number; of one expert's, or of one half's, which of them."""

    whole: str
    expert: int | None = None
    half: int | None = None
    """0 of a gate alone, 1 of what it opens."""


def name_of(theirs: str) -> Name | None:
    """The name in the table of what a checkpoint calls so, the whole model's layers counted; None of no weights."""
    if WITHOUT_WEIGHTS.match(theirs):
        return None
    for old, new in (*OLD, *FUSED):
        theirs = old.sub(new, theirs)
    half = HALF.fullmatch(theirs)
    if half:
        theirs = half[1]
    which = None if half is None else "wv".index(half[2])
    for pattern in EXPERT:
        found = pattern.fullmatch(theirs)
        if found:
            return Name(f"{found['before']}{found['matrix']}.{found['kind']}", int(found["number"]), which)
    return Name(ALL_EXPERTS.sub(r"\1\2", theirs), None, which)


def moved(theirs: str, first: int) -> str:
    """A name whose layers count from 0 in a part of a model, as one of the whole whose layer `first` is the part's."""
    found = NUMBERED.fullmatch(theirs)
    return f"{LAYERS}{int(found[1]) + first}.{found[2]}" if found else theirs


def joined(whole: str, *, is_gated: bool) -> Joined:
    """How the parts of tensor-parallel ranks make a tensor: rows of all, halves of rows, columns, or all the same."""
    if whole.endswith((".linear_fc1.weight", ".linear_fc1.bias")):
        return "halves" if is_gated else "rows"
    if whole.endswith((".linear_qkv.weight", ".linear_qkv.bias", ".softmax_offset", "word_embeddings.weight")):
        return "rows"
    if whole == "output_layer.weight":
        return "rows"
    return "columns" if whole.endswith((".linear_proj.weight", ".linear_fc2.weight")) else "same"

"""The family of decoders, as a configuration knows it."""

from collections.abc import Mapping
from typing import Any

from jaxtron.config import UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.cost import model_flops_per_token, num_parameters, padding_flops_per_token, passes
from jaxtron.models.decoder.kinds import MAMBA1, expert_width
from jaxtron.models.decoder.pattern import layer_kinds
from jaxtron.models.decoder.state_space import mamba1_rank, mamba2_heads
from jaxtron.models.decoder.work import decoder_work
from jaxtron.models.family import Cuts, Experts, Family
from jaxtron.sharding.config import ContextConfig


def check(model: ModelConfig, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
    """`UserError` where layers or vocabulary do not fit a mesh of these sizes."""
    model.check(sizes, length, context)


def cuts(model: ModelConfig) -> Cuts | None:
    """Those of a pattern with `|`."""
    parts = model.layout.parts
    return None if parts is None else Cuts(parts, "model.pattern", model.pattern)


def resolve(model: ModelConfig, length: int) -> ModelConfig:
    """The model with a table of learned positions as long as sequences are, where its settings say nothing."""
    if model.max_positions is not None and model.max_positions < length:
        raise UserError(f"data.sequence_length {length} is longer than model.max_positions {model.max_positions}")
    if model.position != "learned" or model.max_positions is not None:
        return model
    return model.model_copy(update={"max_positions": length})


def evaluated(model: ModelConfig) -> ModelConfig:
    """The model with nothing drawn."""
    moe = model.moe.model_copy(update={"jitter": 0.0})
    return model.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0, "moe": moe})


def experts(model: ModelConfig) -> Experts | None:
    """Those of `E` layers."""
    if all(kind.expert_parameters is None for kind in model.kinds):
        return None
    width = "model.moe.expert_size" if model.moe.expert_size else "model.mlp_size"
    return Experts(("model.moe.num_experts", model.moe.num_experts), (width, expert_width(model)))


def sizes(model: ModelConfig) -> str:
    """What decides how large a decoder is."""
    named = {"num_layers": model.num_layers, "hidden_size": model.hidden_size}
    for width in dict.fromkeys(width for kind in model.kinds for width in kind.widths):
        section, _, field = width.rpartition(".")
        settings = getattr(model, section) if section else model
        value = model.mlp_width if width == "mlp_size" else getattr(settings, field)
        if value != type(settings).model_fields[field].default:
            named[width] = value
    texts = [f"model.{name} {value:,}" for name, value in named.items()]
    return f"{', '.join(texts)} and model.vocab_size {model.vocab_size:,}"


def recompute_levels(model: ModelConfig) -> tuple[str, ...]:
    """All names, those about attention's cores where the pattern has some."""
    attends = any(kind.selective for kind in model.kinds)
    return ("none", "selective", "all_but_cores", "full") if attends else ("none", "full")


def meaning(model: ModelConfig) -> dict[str, Any]:
    """A default spelled out, cuts for stages, and the pattern of shares are the same model."""
    layers = model.layout.layers
    heads = [kind.heads(model) for kind in model.kinds if kind.heads is not None]
    # layers of a mixed pattern are other parameters
    pattern = (layers, model.layout.mixed)
    return {
        "pattern": pattern,
        "num_layers": pattern,
        "hybrid": pattern,
        "num_heads": model.num_heads if heads else None,
        "num_kv_heads": model.kv_heads,
        "head_dim": model.head_size,
        "mlp_size": model.mlp_width,
        "norm_bias": model.norms_have_bias,
        "qkv_bias": model.has_qkv_bias,
        "attention_output_bias": model.has_attention_output_bias,
        "mlp_bias": model.has_mlp_bias,
        "attention.scale": [one.scale or one.key**-0.5 for one in heads],
        "moe.expert_size": expert_width(model),
        "moe.bias": model.expert_bias,
        "mamba.expand": model.mamba.expand if model.layout.count(MAMBA1.symbol) else None,
        "mamba.num_heads": mamba2_heads(model),
        "mamba.norm_groups": model.mamba.norm_groups or model.mamba.num_groups,
        "mamba.dt_rank": mamba1_rank(model),
    }


FAMILY = Family(
    config=ModelConfig,
    program="jaxtron.models.decoder.program",
    stacks=lambda model: {"stack/layers" if model.layout.mixed else "stack/periods": model.layout.looped},
    kinds=lambda model: (layer_kinds(model.layout),),
    num_parameters=num_parameters,
    flops_per_token=model_flops_per_token,
    passes=passes,
    check=check,
    leading=lambda model: len(model.layout.leading),
    cuts=cuts,
    resolve=resolve,
    evaluated=evaluated,
    sizes=sizes,
    meaning=meaning,
    vocabulary="vocab_size",
    text_loss="loss",
    experts=experts,
    no_experts="put E in model.pattern or leave it out",
    continues_text=True,
    writes="continuation",
    work=decoder_work,
    recompute=recompute_levels,
    padding_flops=padding_flops_per_token,
)

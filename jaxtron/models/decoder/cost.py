"""What a decoder costs: parameters and floating-point operations, as the papers count them."""

from jaxtron.layers.config import GATED
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.pattern import ATTENTION, ATTENTIONS, MLP, WINDOW

# What each name in `ModelConfig.recomputed` computes again, of the parts of `_forward_flops`.
RECOMPUTED_PARTS = {
    "layer": ("projections", "attention_core", "mlp"),
    "attention": ("projections", "attention_core"),
    "attention_core": ("attention_core",),
    "mlp": ("mlp",),
}


def num_parameters(config: ModelConfig, sequence_length: int) -> int:
    """Parameters of the decoder, padding of the vocabulary included: exactly those of its `Blueprint`.

    `sequence_length` in tokens is the length of a learned position table where `max_positions` is none. A GPT has
    2104.04473's Eq. 2, 12 l h^2 + 13 l h + (v + s) h, and 2 h more: the equation leaves out the final norm.
    """
    hidden, layout = config.hidden_size, config.layout
    tables = config.padded_vocab * (1 if config.tied_head else 2)
    if config.position == "learned":
        tables += config.max_positions or sequence_length
    norms = len(layout.layers) + 1 + config.embedding_norm
    layers = layout.count(*ATTENTIONS) * _attention_parameters(config) + layout.count(MLP) * _mlp_parameters(config)
    return tables * hidden + norms * _norm_parameters(config, hidden) + layers


def model_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward without recompute (2205.05198, Eq. 7: 72 l h^2 (1 + s/6h + v/12lh)).

    Products count 2 per multiply-add, the backward twice the forward; attention counts the whole square of scores,
    as the papers do, although half of it is masked; in a window, as many scores a token as the window is long.
    """
    head = 2 * config.hidden_size * config.padded_vocab
    return 3.0 * (sum(_forward_flops(config, sequence_length).values()) + head)


def hardware_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward with the forward of all that `recompute` computes again.

    `full` is 2104.04473, Eq. 3: 96 l h^2 (1 + s/6h + v/16lh). `selective` adds the two products of the scores, 4 l h s.
    2205.05198, App. A, adds three times that, 12 l h s (its s/3h in place of s/6h), so the paper's hardware FLOPs are
    `model + 3 * (hardware - model)`. The head is never computed again.
    """
    forward = _forward_flops(config, sequence_length)
    again = {part for name in config.recomputed for part in RECOMPUTED_PARTS[name]}
    return model_flops_per_token(config, sequence_length) + sum(forward[part] for part in again)


def _forward_flops(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of one token's forward by part of the layers: attention's projections, its core, the MLP."""
    hidden, heads, head = config.hidden_size, config.num_heads, config.head_size
    projections = 2 * hidden * head * (2 * heads + 2 * config.kv_heads)
    mlp = 2 * hidden * config.mlp_width * (3 if config.activation in GATED else 2)
    layout, window = config.layout, min(config.attention.window or 0, sequence_length)
    scores = layout.count(ATTENTION) * sequence_length + layout.count(WINDOW) * window
    return {
        "projections": layout.count(*ATTENTIONS) * projections,
        "attention_core": 4 * scores * heads * head,
        "mlp": layout.count(MLP) * mlp,
    }


def _norm_parameters(config: ModelConfig, size: int) -> int:
    return size * (2 if config.bias and config.norm != "rms_norm" else 1)


def _attention_parameters(config: ModelConfig) -> int:
    hidden, head = config.hidden_size, config.head_size
    queries, keys = config.num_heads * head, config.kv_heads * head
    has_qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
    biases = (queries + 2 * keys if has_qkv_bias else 0) + (hidden if config.bias else 0)
    norms = 2 * _norm_parameters(config, head) if config.qk_norm else 0
    return 2 * hidden * (queries + keys) + biases + norms + config.attention.sinks * config.num_heads


def _mlp_parameters(config: ModelConfig) -> int:
    hidden = config.hidden_size
    up = config.mlp_width * (2 if config.activation in GATED else 1)
    return hidden * (up + config.mlp_width) + (up + hidden if config.bias else 0)

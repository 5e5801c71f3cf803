"""What a decoder costs: parameters and floating-point operations, as the papers count them."""

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import KINDS, LayerKind, norm_parameters
from jaxtron.models.decoder.pattern import Branch
from jaxtron.roles import Role


def num_parameters(config: ModelConfig, sequence_length: int) -> int:
    """Parameters of the decoder, padding of the vocabulary included: exactly those of its `Blueprint`.

    `sequence_length` in tokens is the length of a learned position table where `max_positions` is none. A GPT has
    2104.04473's Eq. 2, 12 l h^2 + 13 l h + (v + s) h, and 2 h more: the equation leaves out the final norm.
    """
    norms = (1 + config.embedding_norm) * norm_parameters(config, config.hidden_size)
    layers = leading_parameters(config) + config.layout.repeats * period_parameters(config)
    return table_parameters(config, sequence_length) + norms + layers


def num_active_parameters(config: ModelConfig, sequence_length: int) -> int:
    """Those of `num_parameters` that a token goes through: of a layer's experts as many as it chooses."""
    experts = config.layout.repeats * period_expert_parameters(config)
    asleep = experts * (config.moe.num_experts - config.moe.top_k) // config.moe.num_experts
    return num_parameters(config, sequence_length) - asleep


def period_parameters(config: ModelConfig, tensor: int = 1) -> int:
    """Parameters of one period of the pattern on each of `tensor` devices, whole over the other axes of the mesh."""
    return layers_parameters(config, config.layout.period, tensor)


def leading_parameters(config: ModelConfig, tensor: int = 1) -> int:
    """Those of all periods that lead the others."""
    return sum(layers_parameters(config, period, tensor) for period in config.layout.leading)


def layers_parameters(config: ModelConfig, layers: tuple[Branch, ...], tensor: int = 1) -> int:
    """Parameters of some residual layers on each of `tensor` devices."""
    branches = sum(KINDS[symbol].parameters(config, tensor) for branch in layers for symbol in branch)
    norms = sum(config.num_norms(len(branch)) for branch in layers)
    return branches + norms * norm_parameters(config, config.hidden_size)


def period_expert_parameters(config: ModelConfig) -> int:
    """Those of `period_parameters` that are experts', all of them."""
    return layers_expert_parameters(config, config.layout.period)


def layers_expert_parameters(config: ModelConfig, layers: tuple[Branch, ...]) -> int:
    """Those of `layers_parameters` that are experts', all of them."""
    kinds = (KINDS[symbol] for branch in layers for symbol in branch)
    return sum(kind.expert_parameters(config) for kind in kinds if kind.expert_parameters is not None)


def embedding_parameters(config: ModelConfig, sequence_length: int, tensor: int = 1) -> int:
    """Parameters of the embedding and of learned positions on each of `tensor` devices."""
    positions = (config.max_positions or sequence_length) if config.position == "learned" else 0
    return config.hidden_size * (config.padded_vocab // tensor + positions)


def table_parameters(config: ModelConfig, sequence_length: int, tensor: int = 1) -> int:
    """Those of the embedding, of a head of its own and of its bias."""
    head = 0 if config.tied_head else config.hidden_size
    head = (head + config.head_bias) * (config.padded_vocab // tensor)
    return embedding_parameters(config, sequence_length, tensor) + head


def model_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward without recompute (2205.05198, Eq. 7: 72 l h^2 (1 + s/6h + v/12lh)).

    Products count 2 per multiply-add, the backward twice the forward; attention counts the whole square of scores,
    as the papers do, although half of it is masked; in a window, as many scores a token as the window is long.
    """
    head = 2 * config.hidden_size * config.padded_vocab
    layers = sum(sum(_forward_flops(config, kind, sequence_length).values()) for kind in config.kinds)
    return 3.0 * (layers + head)


def passes(config: ModelConfig, name: str, role: Role, axes: tuple[str, ...]) -> float:
    """How many products of a token each number of this parameter is in, in the mean; a table is the head's or none."""
    if role == "embedding":
        return float(config.tied_head or name.startswith("head."))
    if role not in ("kernel", "router"):
        return 0.0
    return config.moe.top_k / config.moe.num_experts if "expert" in axes else 1.0


def padding_flops_per_token(config: ModelConfig) -> float:
    """Those of `model_flops_per_token` that rows of the vocabulary take which are no tokens."""
    return 6 * config.hidden_size * (config.padded_vocab - config.vocab_size)


def hardware_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward with the forward of all that `recompute` computes again.

    `full` is 2104.04473, Eq. 3: 96 l h^2 (1 + s/6h + v/16lh). `selective` adds the two products of the scores, 4 l h s.
    2205.05198, App. A, adds three times that, 12 l h s (its s/3h in place of s/6h), so the paper's hardware FLOPs are
    `model + 3 * (hardware - model)`. The head is never computed again, layers that lead the pattern always are.
    """
    leading = [KINDS[symbol] for period in config.layout.leading for branch in period for symbol in branch]
    again = sum(sum(kind.flops(config, sequence_length).values()) for kind in leading)
    for kind in config.kinds:
        is_whole = bool({"layer", kind.module} & config.recomputed)
        forward = _forward_flops(config, kind, sequence_length)
        here = {region for region in forward if is_whole or region in config.recomputed} - config.spared
        again += sum(forward[region] for region in here)
    return model_flops_per_token(config, sequence_length) + again


def _forward_flops(config: ModelConfig, kind: LayerKind, sequence_length: int) -> dict[str, int]:
    """FLOPs of one token's forward through all layers of a kind, by region."""
    count = config.layout.count(kind.symbol)
    return {region: count * flops for region, flops in kind.flops(config, sequence_length).items()}

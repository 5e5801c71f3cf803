"""What a decoder costs: parameters and floating-point operations, as the papers count them."""

from jaxtron.layers.mlp import GATED
from jaxtron.models.config import ModelConfig


def model_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward without recompute (2205.05198, Eq. 7: 72 l h^2 (1 + s/6h + v/12lh)).

    Products count 2 per multiply-add, the backward twice the forward; attention counts the whole square of scores,
    as the papers do, although half of it is masked.
    """
    hidden, heads, head = config.hidden_size, config.num_heads, config.head_size
    projections = hidden * head * (2 * heads + 2 * config.kv_heads)
    attention = 2 * projections + 4 * sequence_length * heads * head
    mlp = 2 * hidden * config.mlp_width * (3 if config.activation in GATED else 2)
    layers = config.layout.count("*") * attention + config.layout.count("-") * mlp
    return 3.0 * (layers + 2 * hidden * config.padded_vocab)

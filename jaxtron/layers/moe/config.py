"""Settings of a mixture of experts: how tokens choose, how load is balanced, how tokens travel."""

from typing import Literal

from pydantic import Field

from jaxtron.config import Config

Scores = Literal["softmax", "topk_softmax", "sigmoid"]


class MoeConfig(Config):
    """Experts of an `E` layer, and the router that chooses some of them for each token."""

    num_experts: int = Field(default=8, ge=1, le=2**16)
    """Experts of a layer."""
    top_k: int = Field(default=2, ge=1)
    """Experts that a token is sent to."""
    expert_size: int | None = Field(default=None, ge=1)
    """Width of an expert's MLP (none: model.mlp_size, or what follows from model.hidden_size)."""
    scores: Scores = "softmax"
    """What weighs an expert: softmax over all of them, then the top k; topk_softmax: softmax over the chosen (Mixtral);
    sigmoid of each (DeepSeek-V3)."""
    renormalize: bool = False
    """The weights of a token's experts are divided by their sum (softmax and sigmoid)."""
    scaling: float = Field(default=1.0, gt=0)
    """Factor of the weights (DeepSeek-V3: 2.5)."""
    balance: float = Field(default=0.01, ge=0)
    """Coefficient of the load-balancing loss of each sequence (2101.03961; Megatron's seq_aux_loss)."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the squared log-sum-exp of router logits (ST-MoE, 2202.08906: 1e-3)."""
    slots: float = Field(default=1.25, gt=0)
    """Rows of an expert in one round of the exchange, times the even share; what has no place goes in a further round,
    so nothing is dropped."""

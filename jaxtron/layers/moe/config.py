"""Settings of a mixture of experts: how tokens choose, how load is balanced, how tokens travel."""

import math
from typing import Literal

from pydantic import Field

from jaxtron.config import Config
from jaxtron.kernels.grouped_matmul.config import Implementation

Scores = Literal["softmax", "topk_softmax", "sigmoid"]
GroupScore = Literal["largest", "two_largest"]
BalanceOver = Literal["sequence", "microbatch", "global"]
Drop = Literal["probability", "position", "random"]
Way = Literal["rounds", "all_gather", "capacity"]
Buckets = Literal["expert", "device"]


class MoeConfig(Config):
    """Experts of an `E` layer, and the router that chooses some of them for each token."""

    num_experts: int = Field(default=8, ge=1, le=2**16)
    """Experts of a layer."""
    top_k: int = Field(default=2, ge=1)
    """Experts that a token is sent to."""
    expert_size: int | None = Field(default=None, ge=1)
    """Width of an expert's MLP (none: model.mlp_size, or what follows from model.hidden_size)."""
    leading_dense: int = Field(default=0, ge=0)
    """The first so many layers with experts have an MLP, of model.mlp_size, in their place (DeepSeek-V3: 3)."""
    shared_size: int = Field(default=0, ge=0)
    """Width of an MLP beside the experts that every token goes through: of several shared experts, their sum."""
    shared_gate: bool = False
    """What the shared MLP adds is multiplied by the sigmoid of a learned product (Qwen2-MoE)."""
    scores: Scores = "softmax"
    """What weighs an expert: softmax over all of them, then the top k; topk_softmax: softmax over the chosen (Mixtral);
    sigmoid of each (DeepSeek-V3)."""
    renormalize: bool = False
    """The weights of a token's experts are divided by their sum (softmax and sigmoid)."""
    scaling: float = Field(default=1.0, gt=0)
    """Factor of the weights (DeepSeek-V3: 2.5)."""
    groups: int = Field(default=1, ge=1)
    """Equal groups of neighbouring experts, of which a token chooses `top_groups` first (DeepSeek: a node's)."""
    top_groups: int = Field(default=1, ge=1)
    """Groups that a token's experts are in."""
    group_score: GroupScore = "largest"
    """What ranks a group: its largest score (DeepSeek-V2), or the sum of its two_largest (DeepSeek-V3)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """What the router reads in training is multiplied by random numbers in 1 +- this (Switch: 0.01)."""
    balance: float = Field(default=0.01, ge=0)
    """Coefficient of the load-balancing loss, which is 1 where load is even (2101.03961)."""
    balance_over: BalanceOver = "sequence"
    """Tokens whose load that is: of each sequence by itself (Megatron's seq_aux_loss), the same on every mesh; of a
    microbatch on all devices (its aux_loss, which counts each data-parallel rank by itself); global: of the step's
    microbatches so far, on all devices (its global_aux_loss)."""
    bias_rate: float = Field(default=0.0, ge=0)
    """What a step adds to the selection bias of an expert that has fewer tokens than the mean, and takes where it has
    more (2408.15664, DeepSeek-V3: 0.001); the bias only chooses, it weighs nothing."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the squared log-sum-exp of router logits (ST-MoE, 2202.08906: 1e-3)."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Tokens that an expert takes of one sequence, times the even share; the others pass it by (none: all are taken).
    """
    drop: Drop = "probability"
    """Which tokens pass by an expert that is full: those of least probability, of last position, or random ones."""
    exchange: Way = "rounds"
    """How tokens get to experts on other devices: pairs of token and expert in rounds of a fixed size; all_gather: all
    tokens to all who share experts, which pays where top_k is near mesh.expert; capacity: one round with room for all
    that capacity_factor lets through."""
    slots: float = Field(default=1.25, gt=0)
    """Rows of a bucket in one round, times the even share; what has no place goes in a further round, so nothing is
    dropped."""
    buckets: Buckets = "expert"
    """What a round has so many rows for: each expert, and one batched product is of all of them; or each device, whose
    rows a grouped product multiplies by expert: fewer empty rows where experts are many and small."""
    implementation: Implementation = "auto"
    """Kernel of grouped products, only where a bucket is a device."""

    def round_rows(self, num_tokens: int, of_bucket: int = 1) -> int:
        """Rows of a bucket of so many experts in a round: `slots` times the even share of a device's pairs.

        At most those of every token, each once for every expert of the bucket that it can choose.
        """
        even = num_tokens * self.top_k * of_bucket / self.num_experts
        return min(num_tokens * min(self.top_k, of_bucket), max(8, math.ceil(self.slots * even / 8) * 8))

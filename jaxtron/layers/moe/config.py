"""Settings of a mixture of experts: how tokens choose, how load is balanced, how tokens travel."""

import math
from typing import Literal, NamedTuple, Self

from pydantic import Field

from jaxtron.config import Config
from jaxtron.kernels.grouped_matmul.config import TILE, Implementation

Scores = Literal["softmax", "topk_softmax", "sigmoid"]
GroupScore = Literal["largest", "two_largest"]
BalanceOver = Literal["sequence", "microbatch", "global"]
Drop = Literal["probability", "position", "random"]
Way = Literal["rounds", "all_gather", "capacity"]
Buckets = Literal["auto", "expert", "device"]


class Round(NamedTuple):
    """Of one round of an exchange."""

    rows: int
    """Of a bucket: a token's, for whichever of its experts are there."""
    pairs: int
    """Pairs of token and expert that these are for at most."""
    has_rounds: bool
    """Whether there can be further ones."""


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
    bias: bool | None = None
    """Biases of the router, and of all products of experts and of the MLP beside them (none: as model.bias; gpt-oss).
    """
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
    buckets: Buckets = "auto"
    """What a round has so many rows for: each expert, and one batched product is of all of them, empty ones included;
    or each device, whose tokens travel once, whichever of its experts they are for, and grouped products are of the
    rows that came, by tiles of 128. auto: where devices have a kernel of grouped products, what multiplies fewer rows.
    """
    implementation: Implementation = "auto"
    """Kernel of grouped products, only where a bucket is a device."""

    def capacity(self, length: int) -> int:
        """Tokens of a sequence of so many that an expert takes where it drops some: all of them at most."""
        assert self.capacity_factor is not None
        return min(length, math.ceil(length * self.top_k * self.capacity_factor / self.num_experts))

    def with_buckets(self, num_tokens: int, parts: int, widths: int, room: int | None, *, has_kernel: bool) -> Self:
        """These settings with what a bucket is, for which `auto` stands: arguments as of `round_of`.

        `widths` devices share an expert's width; `has_kernel`: whether devices have a kernel of grouped products.
        """
        if self.buckets != "auto":
            return self
        by_expert, by_device = (self.model_copy(update={"buckets": name}) for name in ("expert", "device"))
        if self.implementation != "auto":
            return by_device
        if not has_kernel:
            return by_expert
        fewer = by_device.multiplied(num_tokens, parts, widths, room) < by_expert.multiplied(
            num_tokens, parts, widths, room
        )
        return by_device if fewer else by_expert

    def multiplied(self, num_tokens: int, parts: int, widths: int, room: int | None) -> float:
        """Rows that a device's experts multiply of so many tokens on each device if load is even, `round_of`'s
        arguments: those of a round, or of each expert what comes and, on average, half a tile that fills its last."""
        gathers = self.exchange == "all_gather"
        own = self.num_experts // parts
        pairs = self.round_of(num_tokens, parts, room).pairs * self.num_buckets(parts) * (1 if gathers else widths)
        if self.buckets != "device":
            return pairs
        even = num_tokens * self.top_k / (self.num_experts if gathers else own) * (1 if gathers else widths)
        return own * max(TILE, min(even, pairs / own) + TILE / 2)

    def num_buckets(self, parts: int) -> int:
        """Buckets that a device's pairs are of, for experts on so many parts; `buckets` is no `auto`."""
        own = self.num_experts // parts
        known = own if self.exchange == "all_gather" else self.num_experts
        return known // (own if self.buckets == "device" else 1)

    def round_of(self, num_tokens: int, parts: int, room: int | None) -> Round:
        """What a device has room for in a round: of so many tokens, for experts on so many parts.

        `buckets` is no `auto`. `room` is what an expert takes of a device's sequences (none: all). `slots` times the
        even share of the tokens that go to a bucket, and of their pairs; at most all of them.
        """
        assert self.buckets != "auto"
        own, grouped = self.num_experts // parts, self.buckets == "device"
        of_bucket = own if grouped else 1
        choices = min(self.top_k, of_bucket)
        most = num_tokens * choices
        if self.exchange == "capacity":
            assert room is not None
            pairs = min(most, room * of_bucket)
            return Round(min(num_tokens, pairs), pairs, False)
        if grouped and parts == 1:
            # all pairs, in tiles: no more than there are
            return Round(num_tokens, num_tokens * self.top_k, False)
        # a token's pairs go in one round
        pairs = min(most, max(choices, self._with_slots(num_tokens * self.top_k * of_bucket / self.num_experts)))
        if not grouped:
            return Round(pairs, pairs, pairs < most)
        rows = num_tokens
        if self.exchange == "rounds":
            rows = min(num_tokens, self._with_slots(num_tokens * self.reach(own)))
        return Round(rows, pairs, rows < num_tokens or pairs < most)

    def _with_slots(self, even: float) -> int:
        return max(8, math.ceil(self.slots * even / 8) * 8)

    def reach(self, experts: int) -> float:
        """The share of tokens that choose any of so many neighbouring experts, where none is chosen more often."""
        size = self.num_experts // self.groups
        if self.groups == 1 or (size % experts and experts % size):
            return 1 - _avoided(self.num_experts, experts, self.top_k)
        # by how many of the groups that they lie in are open to a token
        groups, total = max(1, experts // size), 0.0
        for count in range(1, min(groups, self.top_groups) + 1):
            ways = math.comb(groups, count) * math.comb(self.groups - groups, self.top_groups - count)
            reached = 1 - _avoided(size * self.top_groups, min(experts, count * size), self.top_k)
            total += ways / math.comb(self.groups, self.top_groups) * reached
        return total


def _avoided(num_experts: int, experts: int, top_k: int) -> float:
    """The share of choices of `top_k` of so many experts that have none of these."""
    return math.comb(num_experts - experts, top_k) / math.comb(num_experts, top_k)

"""How an implementation runs a step: which communication it hides, and which kernels it has."""

from dataclasses import dataclass
from typing import Literal

Attention = Literal["plain", "softmax_kernel", "fused"]
ExpertRows = Literal["round", "chosen"]


@dataclass(frozen=True)
class Overlap:
    """The part of each kind of communication, 0 to 1, that runs beside products.

    No more is hidden than there is to hide behind: for all but `data` and `pipe` the products of the same layer and
    slot, for `data` those of one backward or forward. A hidden message (`pipe`) still takes its time to arrive.
    """

    tensor: float = 0.0
    """Collectives of tensor parallelism."""
    regather: float = 0.0
    """Those that a backward makes only to have a product's input again (2205.05198, sec. 4.2.2)."""
    fsdp: float = 0.0
    """Gathering weights at use, and reducing their gradients there."""
    data: float = 0.0
    """What gradients and weights need once a step."""
    pipe: float = 0.0
    """Messages between stages."""
    context: float = 0.0
    """Keys and values of other parts of a sequence."""
    expert: float = 0.0
    """Tokens on their way to experts and back."""
    pairs: float = 0.0
    """The same where a forward and a backward go through their layers together, behind the products of both."""


@dataclass(frozen=True)
class Profile:
    """Overlap and kernels; the defaults are Jaxtron's, with nothing hidden but weights and messages, and where
    `pipeline.overlap` joins a forward and a backward the exchange of each behind the other.

    `sequence_sharded`: norms, dropout and the residual stream are split over `tensor` (2205.05198), else copied.
    `attention`: scores in memory in float32 (plain), in 16 bits with a softmax kernel (2104.04473, sec. 4.2), or never
    (fused: 2205.14135). `logit_bytes`: moved for each logit between the head's products. Jaxtron: written in float32,
    read for the maximum, the sum and the gradient, which is written in 16 bits. `expert_rows`: what travels to experts
    and is multiplied there, rounds of a fixed size with what is empty in them, or the rows that were chosen.
    `shares_outer`: stages share the state of what is in no stack, else one that uses it has all of it.
    """

    overlap: Overlap = Overlap(fsdp=1.0, pipe=1.0, context=1.0, pairs=1.0)
    sequence_sharded: bool = True
    attention: Attention = "plain"
    logit_bytes: int = 18
    expert_rows: ExpertRows = "round"
    shares_outer: bool = True


# Megatron's loss without a fused kernel, pass by pass: logits written in 16 bits 2, cast 6, maximum 4, difference 8,
# exponential 8, sum 4, quotient 8; backward 8, and cast 6.
_MEGATRON_LOGIT_BYTES = 54

JAXTRON = Profile()
# Megatron-LM of 2104.04473 and MT-NLG: all-reduces, fused softmax, everything exposed.
MEGATRON_2021 = Profile(
    Overlap(),
    sequence_sharded=False,
    attention="softmax_kernel",
    logit_bytes=_MEGATRON_LOGIT_BYTES,
    shares_outer=False,
)
# 2205.05198: sequence parallelism; inputs are gathered again beside the input gradient's product.
MEGATRON_2022 = Profile(
    Overlap(regather=1.0),
    sequence_sharded=True,
    attention="softmax_kernel",
    logit_bytes=_MEGATRON_LOGIT_BYTES,
    shares_outer=False,
)
# Megatron Core 0.8 with its overlaps on: fused attention; tensor collectives in parts beside their products, all but
# the first or the last part; gradients reduced beside the last backward, weights gathered beside the first forward;
# messages beside other microbatches.
MEGATRON_2024 = Profile(
    Overlap(tensor=0.75, regather=1.0, fsdp=1.0, data=1.0, pipe=1.0),
    sequence_sharded=True,
    attention="fused",
    logit_bytes=_MEGATRON_LOGIT_BYTES,
    expert_rows="chosen",
    shares_outer=False,
)

PROFILES = {
    "jaxtron": JAXTRON,
    "megatron_2021": MEGATRON_2021,
    "megatron_2022": MEGATRON_2022,
    "megatron_2024": MEGATRON_2024,
}

"""Attention in the slots of a schedule, by the kernels that a profile has."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtron.plan.formula.workload import (
    MASK_BYTES,
    CollectiveWork,
    PhaseWork,
    RegionWork,
    Shapes,
    SlotWork,
    linear,
)
from jaxtron.plan.machine import Product
from jaxtron.plan.profile import Attention

# (shapes, whether tokens see a window only) -> scores, softmax, dropout and the mix of values
Core = Callable[[Shapes, bool], SlotWork]


def attention(shapes: Shapes, in_window: bool) -> RegionWork:
    """Projections and what travels between the parts of a sequence; and the core, quadratic in the sequence."""
    model, n, d = shapes.model, shapes.tokens, shapes.model.head_size
    heads, kv_heads = shapes.heads, shapes.kv_heads
    projections = linear(shapes, model.hidden_size, (heads + 2 * kv_heads) * d)
    projections += linear(shapes, heads * d, model.hidden_size)
    if model.position == "rotary":
        rotated = PhaseWork(stream=2 * n * (heads + kv_heads) * d * shapes.width, kernels=1)
        projections += SlotWork(forward=rotated, backward=rotated)
    core = CORES[shapes.profile.attention](shapes, in_window)
    return {"attention": projections + _travelling(shapes), "attention_core": core}


def _travelling(shapes: Shapes) -> SlotWork:
    """Keys and values of the other parts of a sequence, and their gradients' sums in float32 on the way back.

    A ring sends what an all-gather and a reduce-scatter do; other methods send no more.
    """
    if shapes.parts == 1:
        return SlotWork()
    elements = 2 * shapes.tokens * shapes.parts * shapes.kv_heads * shapes.model.head_size
    gather = CollectiveWork("all_gather", elements * shapes.width, "context")
    back = (gather, CollectiveWork("reduce_scatter", 4 * elements, "context"))
    return SlotWork(forward=PhaseWork(collectives=(gather,)), backward=PhaseWork(collectives=back))


def _fused(shapes: Shapes, in_window: bool) -> SlotWork:
    """A kernel that keeps no scores: the backward makes them again, and what is outside of a window is left out."""
    s, d = shapes.length, shapes.model.head_size
    queries = shapes.rows * shapes.heads * s / shapes.parts
    stream = queries * d * shapes.width
    if in_window:
        # of a window as many scores a query as it is long: the formulas count no more either
        inside = queries * d * min(shapes.model.attention.window or s, s)
        return SlotWork(
            forward=PhaseWork(attention_flops=4.0 * inside, stream=4 * stream, kernels=1),
            backward=PhaseWork(attention_flops=10.0 * inside, masked_flops=-2.0 * inside, stream=4 * stream, kernels=1),
        )
    # forward two products of the half below the diagonal; of the formulas' four and the scores again, five halves run
    product = 2.0 * queries * s * d
    return SlotWork(
        forward=PhaseWork(attention_flops=product, masked_flops=product, stream=4 * stream, kernels=1),
        backward=PhaseWork(attention_flops=2.5 * product, masked_flops=1.5 * product, stream=8 * stream, kernels=2),
    )


@dataclass(frozen=True)
class _Materialized:
    """Scores in memory, `score_bytes` each, which softmax reads in so many passes and writes as probabilities."""

    score_bytes: int
    passes: int

    def __call__(self, shapes: Shapes, in_window: bool) -> SlotWork:
        s, d, narrow = shapes.length, shapes.model.head_size, shapes.width
        count, queries = shapes.rows * shapes.heads, s / shapes.parts
        square, drops = count * queries * s, shapes.model.attention_dropout > 0
        scores = Product(queries, s, d, count, narrow, output_width=self.score_bytes)
        mix = Product(queries, d, s, count, narrow, output_width=narrow)
        softmax = square * (self.score_bytes * self.passes + narrow)
        dropped = square * (2 * narrow + MASK_BYTES) if drops else 0
        back = square * (2 * narrow + self.score_bytes)
        inputs = Product(s, d, s, count, narrow, output_width=narrow)
        return SlotWork(
            forward=PhaseWork((scores, mix), stream=softmax + dropped, kernels=2 + drops),
            backward=PhaseWork(
                (Product(s, s, d, count, narrow, output_width=narrow), inputs, inputs, inputs),
                stream=back + dropped,
                kernels=2 + drops,
            ),
        )


CORES: dict[Attention, Core] = {
    "fused": _fused,
    # without a kernel of its own softmax reads float32 scores twice more, for maximum and sum
    "plain": _Materialized(score_bytes=4, passes=3),
    "softmax_kernel": _Materialized(score_bytes=2, passes=1),
}

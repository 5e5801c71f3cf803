"""Attention as work of a device, by the kernels that a profile has."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtron.models.work.blocks import linear
from jaxtron.models.work.operations import CollectiveWork, PhaseWork, Product, SlotWork
from jaxtron.models.work.profile import Attention
from jaxtron.models.work.shapes import FLOAT, MASK_BYTES, Shapes

# What its backward holds at its peak beside the classes that shapes explain, as multiples of the scores in float32;
# measured as in blocks.py.
SCORES = 2.5


@dataclass(frozen=True)
class AttentionShapes:
    """Causal self-attention of a device; `window` is in tokens, none where all earlier ones are seen."""

    hidden: int
    heads: float
    kv_heads: float
    head_size: int
    window: int | None = None
    rotary: bool = False
    bias: bool = False
    dropout: bool = False
    """Of the probabilities."""


# scores, softmax, dropout and the mix of values
Core = Callable[[Shapes, AttentionShapes], SlotWork]


def projections(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """Products around attention, rotations, and what travels between the parts of a sequence."""
    n, d, both = shapes.tokens, layer.head_size, layer.heads + 2 * layer.kv_heads
    found = linear(shapes, layer.hidden, both * d, bias=layer.bias)
    found += linear(shapes, layer.heads * d, layer.hidden, bias=layer.bias)
    if layer.rotary:
        rotated = PhaseWork(stream=2 * n * (layer.heads + layer.kv_heads) * d * shapes.width, kernels=1)
        found += SlotWork(forward=rotated, backward=rotated)
    return found + _travelling(shapes, layer)


def core(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """What is quadratic in the sequence."""
    return CORES[shapes.profile.attention](shapes, layer)


def core_temporaries(shapes: Shapes, layer: AttentionShapes) -> float:
    """Bytes that the core's backward needs beside what was kept."""
    if shapes.profile.attention != "plain":
        return 0.0
    return SCORES * FLOAT * shapes.tokens * shapes.length / shapes.parts * layer.heads


def mixed_bytes(shapes: Shapes, layer: AttentionShapes) -> int:
    """Of the mixed values of one row, which the output's weight gradient contracts over tokens."""
    return round(shapes.length // shapes.parts * shapes.width * layer.heads * layer.head_size)


def _travelling(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """Keys and values of the other parts of a sequence, and their gradients' sums in float32 on the way back.

    A ring sends what an all-gather and a reduce-scatter do; other methods send no more.
    """
    if shapes.parts == 1:
        return SlotWork()
    elements = 2 * shapes.tokens * shapes.parts * layer.kv_heads * layer.head_size
    gather = CollectiveWork("all_gather", elements * shapes.width, "context")
    back = (gather, CollectiveWork("reduce_scatter", 4 * elements, "context"))
    return SlotWork(forward=PhaseWork(collectives=(gather,)), backward=PhaseWork(collectives=back))


def _fused(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """A kernel that keeps no scores: the backward makes them again, and what is outside of a window is left out."""
    s, d = shapes.length, layer.head_size
    queries = shapes.rows * layer.heads * s / shapes.parts
    stream = queries * d * shapes.width
    if layer.window is not None:
        # of a window as many scores a query as it is long: the formulas count no more either
        inside = queries * d * min(layer.window, s)
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

    def __call__(self, shapes: Shapes, layer: AttentionShapes) -> SlotWork:
        s, d, narrow = shapes.length, layer.head_size, shapes.width
        count, queries = shapes.rows * layer.heads, s / shapes.parts
        square, drops = count * queries * s, layer.dropout
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

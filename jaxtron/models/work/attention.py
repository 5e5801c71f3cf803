"""Attention as work of a device, by the kernels that a profile has."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtron.models.work.blocks import linear
from jaxtron.models.work.operations import CollectiveWork, FusedKernel, PhaseWork, Product, SlotWork
from jaxtron.models.work.profile import Attention
from jaxtron.models.work.shapes import FLOAT, MASK_BYTES, Shapes, gather, over_tensor, scatter

# What its backward holds at its peak beside the classes that shapes explain, as multiples of the scores in float32;
# measured as in blocks.py.
SCORES = 2.5


@dataclass(frozen=True)
class AttentionShapes:
    """Self-attention of a device; `window` is in tokens, none where all earlier ones are seen, or all there are."""

    hidden: int
    heads: float
    kv_heads: float
    head_size: int
    """Of queries and keys."""
    value_size: int
    window: int | None = None
    rotary: bool = False
    bias: bool = False
    output_bias: bool = False
    gate: bool = False
    """What is attended to is multiplied by a gate, which is one more projection."""
    dropout: bool = False
    """Of the probabilities."""
    causal: bool = True
    """Whether only earlier tokens are seen."""


# scores, softmax, dropout and the mix of values
Core = Callable[[Shapes, AttentionShapes], SlotWork]


def projections(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """Products around attention, rotations, and what travels between the parts of a sequence."""
    d, v = layer.head_size, layer.value_size
    inputs = layer.heads * d + layer.kv_heads * (d + v)
    found = linear(shapes, layer.hidden, inputs, bias=layer.bias)
    found += linear(shapes, layer.heads * v, layer.hidden, bias=layer.output_bias)
    if layer.gate:
        found += linear(shapes, layer.hidden, layer.heads * v, bias=layer.bias) + _gated(shapes, layer)
    return found + _rotations(shapes, layer) + _travelling(shapes, layer)


def latent_projections(
    shapes: Shapes, layer: AttentionShapes, queries: int | None, latent: int, shared: int
) -> SlotWork:
    """Products around latent attention: to latents of a device's part of the sequence, which then travel, and of these.

    `queries` is the width of the queries' latent (none: they are made of the stream), `latent` that of keys and values,
    `shared` the rotated part of the keys.
    """
    d, v, down = layer.head_size, layer.value_size, latent + shared + (queries or 0)
    own = replace(shapes, rows=shapes.rows / shapes.tensor) if shapes.profile.sequence_sharded else shapes
    # what heads are made of, put together from the parts of the sequence
    travels = shapes.stream_bytes(latent + shared + (queries or layer.hidden))
    # of matrices that each device has, the gradient of its part of the sequence
    summed = over_tensor(shapes, "all_reduce", layer.hidden * down * shapes.width)
    moved = SlotWork(
        forward=PhaseWork(collectives=gather(shapes, travels)),
        backward=PhaseWork(collectives=scatter(shapes, travels)),
        weight=PhaseWork(collectives=(*gather(shapes, travels, "regather"), *summed)),
    )
    found = linear(own, layer.hidden, down, bias=layer.bias)
    found += linear(shapes, queries or layer.hidden, layer.heads * d)
    found += linear(shapes, latent, layer.heads * (d - shared + v))
    found += linear(shapes, layer.heads * v, layer.hidden, bias=layer.output_bias)
    return found + moved + _rotations(shapes, layer) + _travelling(shapes, layer)


def _gated(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """A product by element: both read and one written, in the backward three and two."""
    size = shapes.tokens * layer.heads * layer.value_size * shapes.width
    return SlotWork(forward=PhaseWork(stream=3 * size, kernels=1), backward=PhaseWork(stream=5 * size, kernels=1))


def _rotations(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    if not layer.rotary:
        return SlotWork()
    size = 2 * shapes.tokens * (layer.heads + layer.kv_heads) * layer.head_size * shapes.width
    rotated = PhaseWork(stream=size, kernels=1)
    return SlotWork(forward=rotated, backward=rotated)


def core(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """What is quadratic in the sequence."""
    return CORES[shapes.profile.attention](shapes, layer)


def core_temporaries(shapes: Shapes, layer: AttentionShapes) -> float:
    """Bytes that the core's backward needs beside what was kept."""
    if shapes.profile.attention != "plain":
        return 0.0
    return SCORES * FLOAT * shapes.tokens * shapes.length / shapes.parts * layer.heads


def _travelling(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """Keys and values of the other parts of a sequence, and their gradients' sums in float32 on the way back.

    A ring sends what an all-gather and a reduce-scatter do; other methods send no more.
    """
    if shapes.parts == 1:
        return SlotWork()
    elements = shapes.tokens * shapes.parts * layer.kv_heads * (layer.head_size + layer.value_size)
    gather = CollectiveWork("all_gather", elements * shapes.width, "context")
    back = (gather, CollectiveWork("reduce_scatter", 4 * elements, "context"))
    return SlotWork(forward=PhaseWork(collectives=(gather,)), backward=PhaseWork(collectives=back))


def _fused(shapes: Shapes, layer: AttentionShapes) -> SlotWork:
    """A kernel that keeps no scores: the backward makes them again, and what is outside of a window is left out."""
    s, d, v = shapes.length, layer.head_size, layer.value_size
    queries = shapes.rows * layer.heads * s / shapes.parts
    # of queries, keys, values and outputs
    stream = 2 * queries * (d + v) * shapes.width
    # of the formulas' four products of the backward two sum over values or make them, and the scores are made again
    backward = 3 * d + 2 * v
    if layer.window is not None or not layer.causal:
        # of a window as many scores a query as it is long, else the whole square: the formulas count no more either
        inside = 2.0 * queries * min(layer.window or s, s)
        return SlotWork(
            forward=PhaseWork(fused=(FusedKernel(inside * (d + v)),), stream=stream, kernels=1),
            backward=PhaseWork(
                fused=(FusedKernel(inside * backward),), masked_flops=-inside * d, stream=stream, kernels=1
            ),
        )
    # forward two products of the half below the diagonal, backward five
    half = queries * s
    forward, hidden = half * (d + v), half * (d + 2 * v)
    return SlotWork(
        forward=PhaseWork(fused=(FusedKernel(forward),), masked_flops=forward, stream=stream, kernels=1),
        backward=PhaseWork(fused=(FusedKernel(half * backward),), masked_flops=hidden, stream=2 * stream, kernels=2),
    )


@dataclass(frozen=True)
class _Materialized:
    """Scores in memory, `score_bytes` each, which softmax reads in so many passes and writes as probabilities."""

    score_bytes: int
    passes: int

    def __call__(self, shapes: Shapes, layer: AttentionShapes) -> SlotWork:
        s, d, v, narrow = shapes.length, layer.head_size, layer.value_size, shapes.width
        count, queries = shapes.rows * layer.heads, s / shapes.parts
        square, drops = count * queries * s, layer.dropout
        scores = Product(queries, s, d, count, narrow, output_width=self.score_bytes)
        mix = Product(queries, v, s, count, narrow, output_width=narrow)
        softmax = square * (self.score_bytes * self.passes + narrow)
        dropped = square * (2 * narrow + MASK_BYTES) if drops else 0
        back = square * (2 * narrow + self.score_bytes)
        inputs = [Product(s, width, s, count, narrow, output_width=narrow) for width in (d, d, v)]
        return SlotWork(
            forward=PhaseWork((scores, mix), stream=softmax + dropped, kernels=2 + drops),
            backward=PhaseWork(
                (Product(s, s, v, count, narrow, output_width=narrow), *inputs),
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

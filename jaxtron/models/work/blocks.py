"""The pieces that most models are made of, as work of a device: what a family adds up to its layers and its ends.

Widths are those of a device where `tensor` splits them (of an MLP, heads, a vocabulary), whole elsewhere (`hidden`).
"""

from dataclasses import replace

from jaxtron.models.work.operations import NOTHING, PhaseWork, Product, SlotWork
from jaxtron.models.work.shapes import FLOAT, MASK_BYTES, Shapes, gather, gathered_weights, over_tensor, scatter

# What an MLP's backward holds at its peak beside the classes that shapes explain, as multiples of arrays that are there
# at the same time: its matrix in float32 and the step's type, and activations as wide as it is. Measured on 20 layouts
# of 1.3 to 1008 billion parameters, JAX 0.11.2 (2026-11): tests/plan/test_estimate.py has them.
MATRICES, HIDDEN = 3.0, 4.0


def linear(shapes: Shapes, inputs: float, outputs: float, *, bias: bool = False) -> SlotWork:
    """A product with a weight, the input's gradient, and the weight's, which is added to a float32 sum."""
    n, width = shapes.tokens, shapes.width
    return SlotWork(
        forward=PhaseWork((Product(n, outputs, inputs, width=width, output_width=width),)),
        backward=PhaseWork((Product(n, inputs, outputs, width=width, output_width=width),)),
        weight=PhaseWork((Product(inputs, outputs, n, width=width, output_width=8),))
        + (PhaseWork(stream=n * outputs * width, kernels=1) if bias else NOTHING),
    )


def eight_bits(shapes: Shapes, hidden: float, work: SlotWork) -> SlotWork:
    """The same with operands of 8 bits: each is read for its maximum, and again to be rounded to a byte a number.

    Inputs are rounded by the pass that made them, which writes bytes instead; those that a weight's gradient reads too.
    As wide as the stream a device rounds its own part. Weights are too small beside tokens to count.
    """
    bytes_of = {"forward": shapes.width + 1, "backward": 2 * shapes.width + 1, "weight": 1}

    def narrow(slot: str, phase: PhaseWork) -> PhaseWork:
        stream = 0.0
        for one in phase.products:
            # of a weight's gradient the tokens are what is contracted
            width = one.m if slot == "weight" else one.k
            tokens = shapes.own_tokens if width == hidden else shapes.tokens
            stream += bytes_of[slot] * one.count * tokens * width
        products = tuple(replace(one, width=1) for one in phase.products)
        kernels = len(products) * (0 if slot == "weight" else 2)
        return replace(phase, products=products, stream=phase.stream + stream, kernels=phase.kernels + kernels)

    return SlotWork(*(narrow(slot, getattr(work, slot)) for slot in bytes_of))


def sent_as_bytes(work: SlotWork) -> SlotWork:
    """The same with what is gathered over `tensor` sent as 8-bit numbers instead of 16."""

    def narrow(phase: PhaseWork) -> PhaseWork:
        is_gather = lambda one: one.kind == "all_gather" and one.purpose in ("tensor", "regather")  # noqa: E731
        sent = (replace(one, size=one.size / 2) if is_gather(one) else one for one in phase.collectives)
        return replace(phase, collectives=tuple(sent))

    return SlotWork(narrow(work.forward), narrow(work.backward), narrow(work.weight))


def mlp(shapes: Shapes, hidden: float, width: float, *, gated: bool = False, bias: bool = False) -> SlotWork:
    """Two products with an activation between them, or three where it is gated."""
    inputs = 2 if gated else 1
    found = linear(shapes, hidden, inputs * width, bias=bias) + linear(shapes, width, hidden, bias=bias)
    stream = shapes.tokens * width * shapes.width
    return found + SlotWork(
        forward=PhaseWork(stream=(inputs + 1) * stream, kernels=1),
        backward=PhaseWork(stream=(2 * inputs + 1) * stream, kernels=1),
    )


def mlp_temporaries(shapes: Shapes, hidden: float, width: float) -> float:
    """Bytes that its backward needs beside what was kept."""
    return MATRICES * FLOAT * hidden * width + HIDDEN * shapes.tokens * shapes.width * width


def norm(shapes: Shapes, hidden: float, *, gathered: bool = True) -> SlotWork:
    """A norm of the stream, whose parts are then put together where what reads it reads all of it."""
    stream = shapes.own_bytes(hidden)
    # forward: input read, output written; backward: input, its gradient and the residual's read, their sum written
    found = SlotWork(forward=PhaseWork(stream=2 * stream, kernels=1), backward=PhaseWork(stream=4 * stream, kernels=2))
    return found + put_together(shapes, hidden) if gathered else found


def residual(shapes: Shapes, hidden: float, *, dropout: bool = False, scattered: bool = True) -> SlotWork:
    """What a branch ends with: its partial sums reduced, where it has some, dropout, and the sum with the stream."""
    stream = shapes.own_bytes(hidden)
    drop = dropout_bytes(shapes, hidden) if dropout else 0.0
    found = SlotWork(
        forward=PhaseWork(stream=3 * stream + drop, kernels=1),
        backward=PhaseWork(stream=(2 * stream if drop else 0) + drop, kernels=1),
    )
    return found + added_up(shapes, hidden) if scattered else found


def put_together(shapes: Shapes, hidden: float) -> SlotWork:
    """A sequence's parts where products over `tensor` begin."""
    size = shapes.stream_bytes(hidden)
    return SlotWork(
        forward=PhaseWork(collectives=gather(shapes, size)),
        backward=PhaseWork(collectives=scatter(shapes, size)),
        weight=PhaseWork(collectives=gather(shapes, size, "regather")),
    )


def added_up(shapes: Shapes, hidden: float) -> SlotWork:
    """Partial sums where they end."""
    size = shapes.stream_bytes(hidden)
    return SlotWork(
        forward=PhaseWork(collectives=scatter(shapes, size)), backward=PhaseWork(collectives=gather(shapes, size))
    )


def embedding(shapes: Shapes, hidden: float, parameters: float, *, passes: int = 2, dropout: bool = False) -> SlotWork:
    """Look-up in a vocabulary-sharded table, and so many passes over the stream; the gradient is added row by row in
    float32. `parameters` are a device's, of the table and of positions."""
    size = shapes.stream_bytes(hidden)
    drop = (dropout_bytes(shapes, hidden) if dropout else 0.0) + passes * 2 * shapes.own_bytes(hidden)
    back = shapes.tokens * hidden * (shapes.width + 8)
    return gathered_weights(shapes, parameters) + SlotWork(
        forward=PhaseWork(stream=2 * size + drop, kernels=3, collectives=scatter(shapes, size)),
        backward=PhaseWork(stream=back + drop, kernels=3, collectives=gather(shapes, size)),
    )


def token_head(shapes: Shapes, hidden: float, vocab: float) -> SlotWork:
    """Final norm, head and loss of tokens, with their gradients: they are formed in the last stage's forward."""
    n, size = shapes.tokens, shapes.stream_bytes(hidden)
    stream = n * vocab * shapes.profile.logit_bytes + 8 * shapes.own_bytes(hidden)
    products = (
        Product(n, vocab, hidden, width=shapes.width, output_width=0),
        Product(n, hidden, vocab, width=shapes.width, output_width=shapes.width),
        Product(vocab, hidden, n, width=shapes.width, output_width=8),
    )
    sums = over_tensor(shapes, "all_reduce", 12.0 * n)
    moved = (*gather(shapes, size), *scatter(shapes, size), *sums)
    weights = gathered_weights(shapes, hidden * vocab)
    work = PhaseWork(products, stream=stream, kernels=8, collectives=moved)
    return SlotWork(forward=work + weights.forward + weights.weight)


def dropout_bytes(shapes: Shapes, hidden: float) -> float:
    """Of the mask of a residual stream's dropout."""
    return shapes.own_tokens * hidden * MASK_BYTES

"""State-space layers as work of a device: products, a convolution, a scan by chunks, a gated norm."""

from dataclasses import dataclass

from jaxtron.models.work.blocks import linear
from jaxtron.models.work.operations import CollectiveWork, PhaseWork, SlotWork
from jaxtron.models.work.shapes import FLOAT, Shapes

# positions of a chunk, kernels/ssd
CHUNK = 128
# of the square of a chunk's pairs, what tiles of 64 leave
BELOW = 0.75
# What the backward holds at its peak beside the classes that shapes explain, as multiples of arrays that are there at
# the same time: a device's matrices in float32, and tokens as wide as its channels and as the stream. Measured as in
# blocks.py on layers of 4096, with 1 and 4 tensor parts, 1 and 4 rows: tests/plan/test_state_space_plans.py has them.
MATRICES, CHANNELS, STREAMS = 2.2, 2.0, 6.5


@dataclass(frozen=True)
class ScanShapes:
    """A Mamba-2 layer of a device."""

    hidden: int
    heads: float
    head_dim: int
    groups: int
    state_size: int

    @property
    def inner(self) -> float:
        """Channels."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """Numbers of B and C."""
        return 2 * self.groups * self.state_size


def mixer(shapes: Shapes, layer: ScanShapes) -> SlotWork:
    """All of it but the norm before it and the sum that ends it."""
    found = linear(shapes, layer.hidden, 2 * layer.inner + layer.shared + layer.heads)
    found += linear(shapes, layer.inner, layer.hidden)
    one = shapes.tokens * shapes.width
    # of the convolution, and of the gated norm
    convolved, normed = one * (layer.inner + layer.shared), one * layer.inner
    found += SlotWork(
        forward=PhaseWork(stream=2 * convolved + 3 * normed, kernels=2),
        backward=PhaseWork(stream=5 * convolved + 5 * normed, kernels=4),
    )
    return found + _scan(shapes, layer) + _travelling(shapes, layer)


def mixer_temporaries(shapes: Shapes, layer: ScanShapes) -> float:
    """Bytes that its backward needs beside what was kept."""
    matrices = layer.hidden * (3 * layer.inner + layer.shared + layer.heads)
    wide = CHANNELS * layer.inner + STREAMS * layer.hidden
    return MATRICES * FLOAT * matrices + shapes.tokens * shapes.width * wide


def _scan(shapes: Shapes, layer: ScanShapes) -> SlotWork:
    """Kernels of 2405.21060's section 6: forward four products a chunk and head, backward eleven, of which the papers'
    count knows nothing: it has 7 FLOPs for each number of the state."""
    tokens, n, p = shapes.tokens * layer.heads, layer.state_size, layer.head_dim
    pairs = 2 * BELOW * CHUNK
    forward = tokens * (pairs * (n + p) + 4 * n * p)
    # scores three times, dM twice and products with both; the states' three, and one of each summed over heads
    backward = tokens * (pairs * (4 * n + 3 * p) + 12 * n * p)
    counted = 7.0 * tokens * n * p
    x, kept = shapes.tokens * layer.inner * shapes.width, tokens / CHUNK * n * p * shapes.width
    shared, steps = shapes.tokens * layer.shared * shapes.width, shapes.tokens * layer.heads * FLOAT
    return SlotWork(
        forward=PhaseWork(
            attention_flops=forward, masked_flops=counted - forward, stream=2 * x + kept + shared + steps, kernels=1
        ),
        backward=PhaseWork(
            attention_flops=backward,
            masked_flops=2 * counted - backward,
            stream=6 * x + 4 * kept + 3 * shared + 6 * steps,
            kernels=3,
        ),
    )


def _travelling(shapes: Shapes, layer: ScanShapes) -> SlotWork:
    """What the pieces of a sequence do to a state, from everyone to everyone, and the ends of what is convolved."""
    if shapes.parts == 1:
        return SlotWork()
    states = 2 * shapes.parts * shapes.rows * layer.heads * (layer.state_size * layer.head_dim + 1) * FLOAT
    moved = PhaseWork(collectives=(CollectiveWork("all_gather", states, "context"),))
    return SlotWork(forward=moved, backward=moved)

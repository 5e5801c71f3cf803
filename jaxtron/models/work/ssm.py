"""State-space layers as work of a device: products, a convolution, a scan by chunks, a gated norm."""

from dataclasses import dataclass

from jaxtron.models.work.blocks import linear
from jaxtron.models.work.operations import CollectiveWork, FusedKernel, PhaseWork, SlotWork
from jaxtron.models.work.shapes import FLOAT, Shapes, over_tensor

# positions of a chunk, kernels/ssd
CHUNK = 128
# of the square of a chunk's pairs, what tiles of 64 leave
BELOW = 0.75
# What the backward holds at its peak beside the classes that shapes explain, as multiples of arrays that are there at
# the same time: a device's matrices in float32, and tokens as wide as its channels and as the stream. Measured as in
# blocks.py on layers of 4096, with 1 and 4 tensor parts, 1 and 4 rows: tests/plan/test_state_space_plans.py has them.
MATRICES, CHANNELS, STREAMS = 2.2, 2.0, 6.5
# The same of Mamba, found with 1 and 4 tensor parts, 1 and 4 rows, states of 32 and 128; and states in float32 that
# are there at the same time, of a chunk's positions, and of a block's chunks and a row's blocks.
SELECTIVE_MATRICES, SELECTIVE_CHANNELS, SELECTIVE_STREAMS = 0.8, 6.7, 5.0
CHUNK_STATES, ENTERING_STATES = 6.0, 2.0
# positions of a block, and numbers of all states of a row's chunk at most, kernels/selective_scan
BLOCK, MOST_NUMBERS = 256, 2**21
# positions of a chunk, kernels/gated_delta
DELTA_CHUNK = 64
# The same of a gated delta net: its chunks are differentiated in float32, many arrays as wide as values and keys.
DELTA_MATRICES, DELTA_CHANNELS, DELTA_STREAMS = 0.9, 11.5, 3.2
# how often a selective scan's forward reads or writes a state of each position: decays and summands, what two
# sweeps of a scan within chunks make of them, and what reads it
SCANNED = 12


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


@dataclass(frozen=True)
class SelectiveShapes:
    """A Mamba layer of a device."""

    hidden: int
    channels: float
    rank: int
    state_size: int

    @property
    def shared(self) -> int:
        """Numbers that a token's steps are made of, and of its B and C."""
        return self.rank + 2 * self.state_size


@dataclass(frozen=True)
class DeltaShapes:
    """A gated delta net of a device."""

    hidden: int
    heads: float
    head_dim: int
    key_heads: int
    key_dim: int

    @property
    def inner(self) -> float:
        """Channels of values."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """Numbers of queries and keys."""
        return 2 * self.key_heads * self.key_dim


def mixer(shapes: Shapes, layer: ScanShapes) -> SlotWork:
    """All of it but the norm before it and the sum that ends it."""
    found = linear(shapes, layer.hidden, 2 * layer.inner + layer.shared + layer.heads)
    found += linear(shapes, layer.inner, layer.hidden)
    found += _around(shapes, layer.inner + layer.shared, layer.inner)
    states = layer.heads * (layer.state_size * layer.head_dim + 1)
    return found + scan(shapes, layer) + _travelling(shapes, states)


def selective_mixer(shapes: Shapes, layer: SelectiveShapes) -> SlotWork:
    """The same of a Mamba layer."""
    found = linear(shapes, layer.hidden, 2 * layer.channels) + linear(shapes, layer.channels, layer.hidden)
    found += linear(shapes, layer.channels, layer.shared) + linear(shapes, layer.rank, layer.channels)
    found += _around(shapes, layer.channels, layer.channels)
    # sums over all channels, and likewise their gradients
    summed = PhaseWork(collectives=over_tensor(shapes, "all_reduce", shapes.tokens * layer.shared * shapes.width))
    found += SlotWork(forward=summed, backward=summed)
    # of a piece of a sequence what is left of a state, and what is added to it
    travels = _travelling(shapes, 2 * layer.channels * layer.state_size)
    return found + _selective_scan(shapes, layer) + travels


def delta_mixer(shapes: Shapes, layer: DeltaShapes) -> SlotWork:
    """The same of a gated delta net."""
    found = linear(shapes, layer.hidden, 2 * layer.inner + layer.shared + 2 * layer.heads)
    found += linear(shapes, layer.inner, layer.hidden)
    found += _around(shapes, layer.inner + layer.shared, layer.inner)
    # what a piece of a sequence does to a state is a matrix, beside what is added to it
    states = layer.heads * layer.key_dim * (layer.head_dim + layer.key_dim)
    return found + _delta_rule(shapes, layer) + _travelling(shapes, states)


def _around(shapes: Shapes, convolved: float, gated: float) -> SlotWork:
    """The convolution before a scan, and the gate behind it, perhaps with a norm: channels of each."""
    one = shapes.tokens * shapes.width
    return SlotWork(
        forward=PhaseWork(stream=one * (2 * convolved + 3 * gated), kernels=2),
        backward=PhaseWork(stream=5 * one * (convolved + gated), kernels=4),
    )


def _selective_scan(shapes: Shapes, layer: SelectiveShapes) -> SlotWork:
    """Loops over chunks in plain JAX: no products, but states of every position that pass through memory."""
    numbers = shapes.tokens * layer.channels * layer.state_size
    counted = 7.0 * numbers
    return SlotWork(
        forward=PhaseWork(masked_flops=counted, stream=SCANNED * FLOAT * numbers, kernels=1),
        backward=PhaseWork(masked_flops=2 * counted, stream=3 * SCANNED * FLOAT * numbers, kernels=1),
    )


def mixer_temporaries(shapes: Shapes, layer: ScanShapes) -> float:
    """Bytes that its backward needs beside what was kept."""
    matrices = layer.hidden * (3 * layer.inner + layer.shared + layer.heads)
    wide = CHANNELS * layer.inner + STREAMS * layer.hidden
    return MATRICES * FLOAT * matrices + shapes.tokens * shapes.width * wide


def selective_temporaries(shapes: Shapes, layer: SelectiveShapes) -> float:
    """The same of a Mamba layer."""
    matrices = 3 * layer.hidden * layer.channels + layer.channels * (layer.shared + layer.rank)
    wide = SELECTIVE_CHANNELS * layer.channels + SELECTIVE_STREAMS * layer.hidden
    numbers = layer.channels * layer.state_size
    positions = min(64, max(8, MOST_NUMBERS // numbers))
    entering = shapes.rows * BLOCK / positions + shapes.tokens / BLOCK
    states = CHUNK_STATES * shapes.rows * positions + ENTERING_STATES * entering
    return FLOAT * (SELECTIVE_MATRICES * matrices + states * numbers) + shapes.tokens * shapes.width * wide


def delta_temporaries(shapes: Shapes, layer: DeltaShapes) -> float:
    """The same of a gated delta net."""
    matrices = layer.hidden * (3 * layer.inner + layer.shared + 2 * layer.heads)
    wide = DELTA_CHANNELS * (layer.inner + layer.shared) + DELTA_STREAMS * layer.hidden
    return FLOAT * DELTA_MATRICES * matrices + shapes.tokens * shapes.width * wide


def scan(shapes: Shapes, layer: ScanShapes) -> SlotWork:
    """Kernels of kernels/ssd, one forward and three backward, and what XLA makes for them: steps and decays of each
    head, and products of B and C once for all heads of a group.

    Of products of states and keys forward has two, backward four; of pairs of positions two and five. Of all these the
    papers' count knows nothing: it has 7 FLOPs for each number of the state.
    """
    n, p = layer.state_size, layer.head_dim
    steps, scores = shapes.tokens * layer.heads * FLOAT, shapes.tokens * layer.groups * CHUNK * shapes.width
    met = 2.0 * shapes.tokens * layer.groups * CHUNK * n
    forward = _ssd_kernel(shapes, layer, pairs=n + p, products=2, channels=2, states=1, shared=1, steps=3, ends=2)
    backward = (
        # gradients of states from chunk to chunk, then each chunk by its inputs and by its outputs
        _ssd_kernel(shapes, layer, pairs=0, products=1, channels=1, states=2, shared=0.5, steps=2, ends=2),
        _ssd_kernel(shapes, layer, pairs=n + 2 * p, products=2, channels=3, states=1, shared=1.5, steps=6, scores=1),
        _ssd_kernel(shapes, layer, pairs=n + p, products=1, channels=2, states=1, shared=1.5, steps=4, scores=1),
    )
    counted = 7.0 * shapes.tokens * layer.heads * n * p
    executed = met + sum(one.flops for one in backward)
    return SlotWork(
        forward=PhaseWork(fused=(forward,), masked_flops=counted - forward.flops, stream=8 * steps, kernels=5),
        backward=PhaseWork(
            fused=(*backward, FusedKernel(met, scores + shapes.tokens * layer.shared * shapes.width)),
            masked_flops=2 * counted - executed,
            # decays once more, their gradients, and products of B and C in both orders
            stream=26 * steps + 6 * scores,
            kernels=20,
        ),
    )


def _ssd_kernel(
    shapes: Shapes,
    layer: ScanShapes,
    *,
    pairs: int,
    products: int,
    channels: int,
    states: int,
    shared: float,
    steps: int,
    scores: int = 0,
    ends: int = 0,
) -> FusedKernel:
    """One of them: numbers that products of pairs of positions contract or make, products of states, and how many
    arrays pass of each kind: as wide as the channels, of chunks' states, of B and C, of numbers by head in float32, of
    a chunk's scores, and of a row's first or last states."""
    tokens, state = shapes.tokens * layer.heads, layer.state_size * layer.head_dim
    flops = tokens * (2 * BELOW * CHUNK * pairs + 2 * state * products)
    narrow = channels * tokens * layer.head_dim + states * tokens / CHUNK * state
    narrow += shapes.tokens * (shared * layer.shared + scores * layer.groups * CHUNK)
    wide = steps * tokens + ends * shapes.rows * layer.heads * state
    return FusedKernel(flops, shapes.width * narrow + FLOAT * wide)


def _delta_rule(shapes: Shapes, layer: DeltaShapes) -> SlotWork:
    """Chunks in plain JAX: keys with keys and with queries, a triangular system, what is read and written of the state.

    The backward makes all of it again, and states of chunks once more.
    """
    tokens, n, p = shapes.tokens * layer.heads, layer.key_dim, layer.head_dim
    pairs = 2.0 * DELTA_CHUNK
    forward = shapes.tokens * layer.key_heads * pairs * 2 * n + tokens * (pairs * 2 * p + 6 * n * p)
    counted = 7.0 * tokens * n * p
    # in float32: values, what is written, pairs of positions three times, and a chunk's states
    stream = FLOAT * tokens * (4 * p + 3 * DELTA_CHUNK + 2 * n * p / DELTA_CHUNK) + FLOAT * shapes.tokens * layer.shared
    return SlotWork(
        forward=PhaseWork(fused=(FusedKernel(forward),), masked_flops=counted - forward, stream=stream, kernels=8),
        backward=PhaseWork(
            fused=(FusedKernel(4 * forward),),
            masked_flops=2 * counted - 4 * forward,
            stream=4 * stream,
            kernels=32,
        ),
    )


def _travelling(shapes: Shapes, numbers: float) -> SlotWork:
    """What a piece of a sequence does to a state, so many numbers of a row, from everyone to everyone."""
    if shapes.parts == 1:
        return SlotWork()
    moved = PhaseWork(
        collectives=(CollectiveWork("all_gather", 2 * shapes.parts * shapes.rows * numbers * FLOAT, "context"),)
    )
    return SlotWork(forward=moved, backward=moved)

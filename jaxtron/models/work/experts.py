"""Experts of a mixture as work of a device: the router, tokens on their way to experts and back, and the products."""

from dataclasses import dataclass

from jaxtron.models.work.operations import NOTHING, CollectiveKind, CollectiveWork, PhaseWork, Product, SlotWork
from jaxtron.models.work.shapes import FLOAT, Shapes

# Small kernels that sort choices, count them and make indices of them.
ROUTER_KERNELS, INDEX_KERNELS = 8, 10
# What the experts' backward holds at its peak beside the classes that shapes explain, as multiples of arrays that are
# there at the same time: a device's matrices in float32, and its rows. Measured on four mixtures of 47 to 141 billion
# parameters, JAX 0.11.2 (2026-11): tests/plan/test_expert_plans.py has them.
EXPERT_MATRICES, EXPERT_ROWS = 2.0, 4.0


@dataclass(frozen=True)
class ExpertShapes:
    """Experts of a layer as a device has them: `own` of them, each `width` wide there."""

    hidden: int
    num_experts: int
    top_k: int
    sent: float
    """Rows that a device sends, and gets back; where tokens are gathered, those that it takes of them."""
    came: float
    """Rows that it has of all that share its experts."""
    held: float
    """Rows that its experts have room for: of each expert of a row that came its own, with what fills tiles."""
    multiplied: float
    """Of these the ones that are multiplied where load is even: all of them, or those in tiles that are not empty."""
    own: float
    width: float
    inputs: int
    """Matrices before the activation: 2 where it is gated."""
    has_rounds: bool
    """Whether devices ask each other how many rounds there are."""
    gathers: bool = False
    """Whether tokens are gathered, rather than pairs sent."""
    grouped: bool = False
    """Whether rows lie in tiles of one expert each."""
    bias: bool = False
    """Whether they and the router add biases."""

    def exchanged(self, shapes: Shapes) -> tuple[float, ...]:
        """Bytes of the arrays that devices with experts send each other: rows, their weights, with which the choices of
        tokens travel, and the gradients of weights."""
        weights = self.sent * self.weights * FLOAT
        asked = 2 * weights if self.grouped else weights
        return () if self.gathers else (self.sent * self.hidden * shapes.width, asked, weights)

    @property
    def weights(self) -> int:
        """Weights of a row: where a bucket is a device, those of all choices of its token."""
        return self.top_k if self.grouped else 1

    def meets(self, shapes: Shapes) -> int:
        """Devices that share experts."""
        return shapes.sizes["expert"] * shapes.sizes["expert_tensor"]

    def kept(self, shapes: Shapes) -> float:
        """Bytes that a layer keeps of them for its backward: rows, their weights, the first product, and where pairs
        went (layers/moe/experts.py)."""
        rows = self.held * self.inputs * self.width * shapes.width
        if not self.grouped or self.meets(shapes) > 1:
            # with the choices of a row's token beside their weights
            rows += self.came * (self.hidden * shapes.width + (2 if self.grouped else 1) * self.weights * FLOAT)
        known = self.own if self.gathers else self.num_experts
        pairs = shapes.own_tokens * self.top_k * (self.meets(shapes) if self.gathers else 1)
        # where a bucket is several experts, rounds are bounded by pairs too
        bounded = self.grouped and self.has_rounds and self.own > 1
        return rows + FLOAT * ((4 if bounded else 3) * pairs + 2 * known / (self.own if self.grouped else 1))


def experts(shapes: Shapes, layer: ExpertShapes) -> SlotWork:
    """Router, exchange and products of a load that is even; what is not goes in further rounds, which count as none."""
    return _router(shapes, layer) + _movements(shapes, layer) + _products(shapes, layer)


def expert_temporaries(shapes: Shapes, layer: ExpertShapes) -> float:
    """Bytes that their backward needs beside what was kept."""
    matrices = layer.own * (layer.inputs + 1) * layer.hidden * layer.width
    return EXPERT_MATRICES * FLOAT * matrices + expert_rows(shapes, layer)


def expert_rows(shapes: Shapes, layer: ExpertShapes) -> float:
    """Bytes of the rows among them, which a forward beside a backward needs as well."""
    return EXPERT_ROWS * layer.held * layer.hidden * shapes.width


def _router(shapes: Shapes, layer: ExpertShapes) -> SlotWork:
    """Float32 logits of a device's own tokens."""
    n, hidden, choices = shapes.own_tokens, layer.hidden, layer.num_experts
    stream = n * (hidden * (shapes.width + FLOAT) + 3 * choices * FLOAT)

    def product(m: float, columns: float, k: float, width: int = FLOAT) -> PhaseWork:
        return PhaseWork((Product(m, columns, k, width=FLOAT, output_width=width),))

    work = PhaseWork(stream=stream, kernels=ROUTER_KERNELS)
    return SlotWork(
        forward=product(n, choices, hidden) + work,
        backward=product(n, hidden, choices) + work,
        weight=product(hidden, choices, n, width=8),
    )


def _movements(shapes: Shapes, layer: ExpertShapes) -> SlotWork:
    """Rows out and back, and the same of their gradients: gathers by row and by pair, and what devices exchange."""
    row, own = layer.hidden * shapes.width, shapes.own_tokens
    travels = layer.meets(shapes) > 1 and not layer.gathers
    # gathered by row, laid out by expert, and again by device, if not in tiles; read by pair, and the sum written
    copies = 2 if travels and not layer.grouped else 0
    stream = 0.0
    if travels or not layer.grouped:
        stream = 2 * (1 + copies) * layer.sent * row + (own * layer.top_k + 2 * own) * row
    if layer.grouped:
        # to tiles and back
        stream += (3 * layer.held + layer.came) * row
    # choices are counted once, in the forward
    asked = _all(shapes, "experts", "all_reduce", FLOAT) if layer.has_rounds else ()
    forward, backward = _gathered(shapes, layer) if layer.gathers else (_sent(shapes, layer, way) for way in (0, 1))
    return SlotWork(
        forward=PhaseWork(stream=stream, kernels=INDEX_KERNELS, collectives=asked + forward),
        backward=PhaseWork(stream=stream, kernels=INDEX_KERNELS, collectives=backward),
    )


def _sent(shapes: Shapes, layer: ExpertShapes, backward: int) -> tuple[CollectiveWork, ...]:
    """Rows and their weights out and rows back, or the gradients of both the other way; where devices share an expert's
    width an all-gather and a reduce-scatter beside."""
    rows, asked, weights = layer.exchanged(shapes)
    parts, small = shapes.sizes["expert_tensor"], weights if backward else asked
    found = 2 * _all(shapes, "expert", "all_to_all", rows) + _all(shapes, "expert", "all_to_all", small)
    found += _all(shapes, "expert_tensor", "all_gather", parts * rows)
    found += _all(shapes, "expert_tensor", "reduce_scatter", parts * rows)
    return found + _all(shapes, "expert_tensor", "reduce_scatter" if backward else "all_gather", parts * small)


def _gathered(shapes: Shapes, layer: ExpertShapes) -> tuple[tuple[CollectiveWork, ...], tuple[CollectiveWork, ...]]:
    """Tokens with choices and weights to all who share experts, float32 sums back; gradients likewise."""
    tokens = shapes.own_tokens * shapes.sizes["expert"] * shapes.sizes["expert_tensor"]
    whole, of_pairs = tokens * layer.hidden, tokens * layer.top_k * FLOAT
    forward = _all(shapes, "experts", "all_gather", whole * shapes.width)
    sums = _all(shapes, "experts", "reduce_scatter", whole * FLOAT)
    choices = 2 * _all(shapes, "experts", "all_gather", of_pairs)
    return forward + choices + sums, forward + sums + _all(shapes, "experts", "reduce_scatter", of_pairs)


def _all(shapes: Shapes, flag: str, kind: CollectiveKind, size: float) -> tuple[CollectiveWork, ...]:
    """A collective along a flag of the experts' view, or along both, which is its purpose too; nothing on one part."""
    flags = ("expert", "expert_tensor") if flag == "experts" else (flag,)
    return (CollectiveWork(kind, size, flag),) if any(shapes.sizes[one] > 1 for one in flags) else ()


def _products(shapes: Shapes, layer: ExpertShapes) -> SlotWork:
    """Of each expert's rows with its two matrices, or three where the activation is gated."""
    held, width, hidden = layer.held, shapes.width, layer.hidden
    rows, inner = layer.multiplied / layer.own, layer.inputs * layer.width

    def product(m: float, columns: float, k: float, output_width: int = width) -> Product:
        return Product(m, columns, k, layer.own, width, output_width)

    # what goes into the last product is made again from what went into the activation
    activation = (layer.inputs + 1) * held * layer.width * width
    # sums over the rows of what entered each product's output
    biases = PhaseWork(stream=held * (inner + hidden) * width, kernels=2) if layer.bias else NOTHING
    return SlotWork(
        forward=PhaseWork(
            (product(rows, inner, hidden), product(rows, hidden, layer.width)), stream=activation, kernels=1
        ),
        backward=PhaseWork(
            (product(rows, layer.width, hidden), product(rows, hidden, inner)),
            stream=(2 * layer.inputs + 1) * held * layer.width * width,
            kernels=1,
        ),
        weight=PhaseWork(
            (product(hidden, inner, rows, 8), product(layer.width, hidden, rows, 8)), stream=activation, kernels=1
        )
        + biases,
    )

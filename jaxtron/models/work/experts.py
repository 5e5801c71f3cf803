"""Experts of a mixture as work of a device: the router, tokens on their way to experts and back, and the products."""

from dataclasses import dataclass

from jaxtron.models.work.operations import CollectiveWork, PhaseWork, Product, SlotWork
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
    rows: float
    """Pairs of token and expert that a device sends to each expert."""
    own: float
    width: float
    inputs: int
    """Matrices before the activation: 2 where it is gated."""
    has_rounds: bool
    """Whether devices ask each other how many rounds there are."""

    @property
    def sent(self) -> float:
        """Rows that a device sends, and gets back."""
        return self.num_experts * self.rows

    def held(self, shapes: Shapes) -> float:
        """Rows that its experts multiply: those of all that share their width."""
        return self.sent * shapes.sizes["expert_tensor"]

    def exchanged(self, shapes: Shapes) -> tuple[float, float]:
        """Bytes of the arrays that devices with experts send each other: rows, and their weights or gradients."""
        return self.sent * self.hidden * shapes.width, self.sent * FLOAT


def experts(shapes: Shapes, layer: ExpertShapes) -> SlotWork:
    """Router, exchange and products of a load that is even; what is not goes in further rounds, which count as none."""
    return _router(shapes, layer) + _movements(shapes, layer) + _products(shapes, layer)


def expert_temporaries(shapes: Shapes, layer: ExpertShapes) -> float:
    """Bytes that their backward needs beside what was kept."""
    matrices = layer.own * (layer.inputs + 1) * layer.hidden * layer.width
    return EXPERT_MATRICES * FLOAT * matrices + EXPERT_ROWS * layer.held(shapes) * layer.hidden * shapes.width


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
    """Rows out and back, and the same of their gradients: gathers by row and by pair, an exchange, and where devices
    share an expert's width an all-gather and a reduce-scatter."""
    row = layer.hidden * shapes.width
    rows, weights = layer.exchanged(shapes)
    parts = shapes.sizes["expert"] * shapes.sizes["expert_tensor"]
    pairs = shapes.own_tokens * layer.top_k
    # gathered by row, laid out by expert, and again by device; read by pair, and the sum written
    copies = 2 if parts > 1 else 0
    stream = 2 * (1 + copies) * rows + (pairs + 2 * shapes.own_tokens) * row
    asked = _all(shapes, "expert", "all_reduce", FLOAT) if layer.has_rounds else ()
    exchanged = (2 * _all(shapes, "expert", "all_to_all", rows)) + _all(shapes, "expert", "all_to_all", weights)
    wide = [size * shapes.sizes["expert_tensor"] for size in (rows, weights)]
    gathered, summed = (_all(shapes, "expert_tensor", kind, wide[0]) for kind in ("all_gather", "reduce_scatter"))
    small = (_all(shapes, "expert_tensor", kind, wide[1]) for kind in ("all_gather", "reduce_scatter"))
    both = asked + exchanged + gathered + summed
    forward, backward = (PhaseWork(stream=stream, kernels=INDEX_KERNELS, collectives=both + one) for one in small)
    return SlotWork(forward=forward, backward=backward)


def _all(shapes: Shapes, flag: str, kind: str, size: float) -> tuple[CollectiveWork, ...]:
    """A collective along a flag of the experts' view, which is its purpose too; nothing on one part."""
    return (CollectiveWork(kind, size, flag),) if shapes.sizes[flag] > 1 else ()


def _products(shapes: Shapes, layer: ExpertShapes) -> SlotWork:
    """Of each expert's rows with its two matrices, or three where the activation is gated."""
    held, width, hidden = layer.held(shapes), shapes.width, layer.hidden
    rows, inner = held / layer.own, layer.inputs * layer.width

    def product(m: float, columns: float, k: float, output_width: int = width) -> Product:
        return Product(m, columns, k, layer.own, width, output_width)

    # what goes into the last product is made again from what went into the activation
    activation = (layer.inputs + 1) * held * layer.width * width
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
        ),
    )

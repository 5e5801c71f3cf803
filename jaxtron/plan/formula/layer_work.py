"""What each kind of layer takes of a GPU: operations of its slots, and bytes beside what its backward keeps."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from jaxtron.layers.config import GATED
from jaxtron.models.decoder.kinds import ATTENTION, MLP, WINDOW
from jaxtron.plan.formula.attention_work import attention
from jaxtron.plan.formula.workload import FLOAT, PhaseWork, RegionWork, Shapes, SlotWork, linear

# What a layer's backward holds at its peak beside the classes that shapes explain, as multiples of arrays that are
# there at the same time. Measured on 20 layouts of 1.3 to 1008 billion parameters, JAX 0.11.2 (2026-11): tests/plan/
# test_estimate.py has them. Scores of attention in float32; of the MLP its matrix in float32 and the step's type, and
# activations as wide as it is.
SCORES, MATRICES, HIDDEN = 2.5, 3.0, 4.0


@dataclass(frozen=True)
class LayerWork:
    """One kind of residual branch, without its norm and the sum that ends it."""

    slots: Callable[[Shapes], RegionWork]
    """Operations by the regions that `model.recompute` can name; what lies in a part is not counted in the whole."""
    temporaries: Callable[[Shapes], float] = lambda shapes: 0.0
    """Bytes that one layer's backward needs beside what was kept; of kinds of one `module` those with most count."""
    transposed: Callable[[Shapes, bool], int] = lambda shapes, in_loop: 0
    """Bytes of one row that a loop over layers keeps a second time, transposed; (shapes, whether it has several)."""


def _scores(shapes: Shapes) -> float:
    if shapes.profile.attention != "plain":
        return 0.0
    return SCORES * FLOAT * shapes.tokens * shapes.length / shapes.parts * shapes.heads


def _mixed(shapes: Shapes, in_loop: bool) -> int:
    """The mixed values, which the output's weight gradient contracts over tokens."""
    return round(shapes.length // shapes.parts * shapes.width * shapes.heads * shapes.model.head_size)


def _mlp(shapes: Shapes) -> RegionWork:
    model, f = shapes.model, shapes.mlp_width
    inputs = 2 if model.activation in GATED else 1
    found = linear(shapes, model.hidden_size, inputs * f) + linear(shapes, f, model.hidden_size)
    stream = shapes.tokens * f * shapes.width
    return {
        "mlp": found
        + SlotWork(
            forward=PhaseWork(stream=(inputs + 1) * stream, kernels=1),
            backward=PhaseWork(stream=(2 * inputs + 1) * stream, kernels=1),
        )
    }


def _mlp_temporaries(shapes: Shapes) -> float:
    matrix = shapes.model.hidden_size * shapes.mlp_width
    return MATRICES * FLOAT * matrix + HIDDEN * shapes.tokens * shapes.width * shapes.mlp_width


def _mlp_hidden(shapes: Shapes, in_loop: bool) -> int:
    # of one row and in a loop of several layers only, and where it is kept as it is multiplied
    if shapes.rows != 1 or not in_loop or shapes.model.activation in GATED:
        return 0
    return round(shapes.length // shapes.parts * shapes.width * shapes.mlp_width)


# by symbol, the keys of models/decoder/kinds.py: KINDS
LAYER_WORK = {
    ATTENTION.symbol: LayerWork(functools.partial(attention, in_window=False), _scores, _mixed),
    WINDOW.symbol: LayerWork(functools.partial(attention, in_window=True), _scores, _mixed),
    MLP.symbol: LayerWork(_mlp, _mlp_temporaries, _mlp_hidden),
}

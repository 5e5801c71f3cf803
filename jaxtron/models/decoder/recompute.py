"""What the backward pass computes again instead of keeping: named regions, and always what costs no product."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from jaxtron.kernels.attention.attention import OUT, SCORES, STATISTICS
from jaxtron.layers.saved import SAVED, checkpoint_inputs

# What a layer keeps of its own accord. Norms, biases, activations and rotations made of them are computed again: that
# reads and writes no more than keeping their results would. Gathered arrays are gathered again.
PRODUCTS = frozenset({"dot_general"})
NAMES = frozenset({SAVED, OUT, STATISTICS, SCORES})
# what attention's backward reads of its forward where no scores are kept
CORES = (OUT, STATISTICS)


@runtime_checkable
class Recomputes(Protocol):
    """Settings of a model whose layers are recomputed by these rules."""

    @property
    def recomputed(self) -> frozenset[str]:
        """Names of the regions computed again in the backward; `layer` for all of it."""
        ...

    @property
    def spared(self) -> frozenset[str]:
        """Regions inside of those that are not, where they keep nothing quadratic in the sequence."""
        ...


def keep_products(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Checkpoint policy of a layer: keep matrix products, and what was named to be saved.

    A product of 8-bit numbers is not kept by itself: what is made of it is, with its scale.
    """
    if primitive.name in PRODUCTS:
        return operands[0].dtype.itemsize > 1
    return primitive.name == "name" and params["name"] in NAMES


def region(name: str, recomputed: frozenset[str], function: Callable) -> Callable:
    """`function`, computed again in the backward if `name` is among the recomputed regions.

    Not a nested `jax.checkpoint`: the policy of the one around it (`layer`) would decide what this one keeps.
    """
    return checkpoint_inputs(function) if name in recomputed else function


def layer(config: Recomputes, function: Callable) -> Callable:
    """A layer under its policy: recomputed from its input if `layer` is recomputed, else as `keep_products`.

    Where attention's core is spared, its backward keeps its result and log-sum-exp beside the layer's input.
    """
    policy = keep_products
    if "layer" in config.recomputed:
        policy = jax.checkpoint_policies.save_only_these_names(*CORES) if config.spared else None
    return jax.checkpoint(function, prevent_cse=False, policy=policy)

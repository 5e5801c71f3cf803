"""What the backward pass computes again instead of keeping: named regions, and gathered arrays always."""

from collections.abc import Callable
from typing import Any

import jax

from jaxtron.layers.keep import keeping_inputs

# A gathered array is its device's part plus communication: keep the part and gather again. `reshard` gathers the
# sequence over tensor (Explicit); weights are gathered over batch axes by a custom VJP around `all_gather`.
GATHERS = frozenset({"all_gather", "reshard"})
# What is only moved: keeping it would keep the gathered array it was made from, such as joined weights.
MOVES = frozenset({"concatenate", "reshape", "transpose", "broadcast_in_dim", "squeeze"})


def keep_all_but_gathers(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy of a layer that recomputes nothing: keep what was computed, gather and move the rest again."""
    if primitive.name == "custom_vjp_call":
        return not _only_gathers(params["call_jaxpr"].jaxpr)
    return primitive.name not in GATHERS | MOVES


def _only_gathers(jaxpr: Any) -> bool:
    inner = [equation.params["jaxpr"] for equation in jaxpr.eqns if equation.primitive.name == "shard_map"]
    others = {equation.primitive.name for equation in jaxpr.eqns} - GATHERS - {"shard_map", "convert_element_type"}
    return not others and all(_only_gathers(part) for part in inner)


def region(name: str, recomputed: frozenset[str], function: Callable) -> Callable:
    """`function`, computed again in the backward if `name` is among the recomputed regions.

    Not a nested `jax.checkpoint`: the policy of the one around it (`layer`) would decide what this one keeps.
    """
    return keeping_inputs(function) if name in recomputed else function


def layer(recomputed: frozenset[str], function: Callable, *, gathers: bool) -> Callable:
    """A scanned layer under its policy; `gathers`: whether it has gathers that must not be kept."""
    if "layer" in recomputed:
        return jax.checkpoint(function, prevent_cse=False)
    return jax.checkpoint(function, prevent_cse=False, policy=keep_all_but_gathers) if gathers else function

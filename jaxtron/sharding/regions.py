"""Code of one device: manual over the axes that the train step handles itself, or over those of tensor inside it."""

from collections.abc import Callable
from typing import Any

import jax

from jaxtron.sharding.rules import current
from jaxtron.typing import PyTree

Function = Callable[..., Any]


def region(function: Function, in_specs: PyTree, out_specs: PyTree) -> Function:
    """`function` on each device's part of its arguments, manual over all axes but tensor's, which stay Explicit."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(current().manual))


def over_tensor(function: Function, in_specs: PyTree, out_specs: PyTree) -> Function:
    """`function` on each device's part along tensor, inside `region`: specs name tensor's axes alone.

    Not to be differentiated through: JAX would name axes of what is kept that are manual already. It wants a custom
    derivative outside of it, whose backward is another.
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(current().axes("tensor")))

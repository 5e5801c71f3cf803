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


def on_each_device(function: Function, in_specs: PyTree, out_specs: PyTree) -> Function:
    """`function` manual over every axis that is not yet: inside `region` those of tensor are left.

    Inside it is not to be differentiated through, as `over_tensor`.
    """
    axes = set(current().mesh.axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes) if axes else function


def over_tensor(function: Function, in_specs: PyTree, out_specs: PyTree) -> Function:
    """`function` on each device's part along tensor, inside `region`: specs name tensor's axes alone.

    Not to be differentiated through: JAX would name axes of what is kept that are manual already. It wants a custom
    derivative outside of it, whose backward is another.
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(current().axes("tensor")))

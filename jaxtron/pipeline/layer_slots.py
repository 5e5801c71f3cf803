"""Stacked layers between the model's order and the slots of all stages."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.rules import current
from jaxtron.typing import Array


def arrange(partition: Partition, layers: Array) -> Array:
    """Stacked layers [layers, ...] in the model's order as the slots [slots, ...] of all stages, empty ones zeros."""
    if partition.is_in_order:
        return layers
    numbers = jnp.asarray(partition.slot_layers, jnp.int32)
    filled = (numbers >= 0).reshape(-1, *(1,) * (layers.ndim - 1))
    return jnp.where(filled, layers[jnp.maximum(numbers, 0)], jnp.zeros((), layers.dtype))


def restore(partition: Partition, slots: Array) -> Array:
    """The inverse of `arrange`."""
    return slots if partition.is_in_order else slots[np.argsort(partition.slot_layers)[-partition.num_layers :]]


def in_model_order(partition: Partition, slots: Array) -> Array:
    """This stage's slots [slots, ...] at the places of their layers [layers, ...], zeros for those of other stages.

    Inside the manual region; a sum over `pipe` has all layers.
    """
    if partition.is_in_order and partition.num_stages == 1:
        return slots
    layers = np.asarray(partition.slot_layers).reshape(partition.num_stages, -1)
    # a slot more than there are is a row of zeros
    slot_of = np.full((partition.num_stages, partition.num_layers), layers.shape[1], np.int32)
    for stage, row in enumerate(layers):
        slot_of[stage, row[row >= 0]] = np.flatnonzero(row >= 0)
    stage = jax.lax.axis_index(current().axes("pipe")) if partition.num_stages > 1 else 0
    padded = jnp.concatenate([slots, jnp.zeros_like(slots[:1])])
    return padded[jnp.asarray(slot_of)[stage]]

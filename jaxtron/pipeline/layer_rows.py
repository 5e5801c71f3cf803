"""Stacked layers between the model's order and the rows of all stages."""

import jax.numpy as jnp
import numpy as np

from jaxtron.pipeline.partition import Partition
from jaxtron.typing import Array


def arrange(partition: Partition, layers: Array) -> Array:
    """Stacked layers [layers, ...] in the model's order as the rows [rows, ...] of all stages, empty ones zeros."""
    if partition.is_in_order:
        return layers
    rows = jnp.asarray(partition.slot_layers, jnp.int32)
    filled = (rows >= 0).reshape(-1, *(1,) * (layers.ndim - 1))
    return jnp.where(filled, layers[jnp.maximum(rows, 0)], jnp.zeros((), layers.dtype))


def restore(partition: Partition, rows: Array) -> Array:
    """The inverse of `arrange`."""
    return rows if partition.is_in_order else rows[np.argsort(partition.slot_layers)[-partition.num_layers :]]

"""Equal layers as one module whose parameters carry a leading axis over the slots of a partition."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.parameters import of_layers
from jaxtron.typing import Array

LayerT = TypeVar("LayerT", bound=nnx.Module)


def stacked(make: Callable[[nnx.Rngs], LayerT], partition: Partition, rngs: nnx.Rngs) -> LayerT:
    """The module of a layer, each parameter with a leading axis over the partition's slots; empty ones are zeros.

    A pipeline's executor runs it, a slot at a time.
    """
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), partition.num_layers)
    # keys are put in the slots' order, not values: so each device makes only its own
    keys = keys if partition.is_in_order else keys[np.maximum(np.asarray(partition.slot_layers), 0)]
    states = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys)
    module = nnx.merge(graph, jax.tree.map(partial(_empty_as_zeros, partition), states))
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            node.set_metadata(spec=of_layers(node.get_metadata("spec"), partition.num_layers))
    return module


def _empty_as_zeros(partition: Partition, slots: Array) -> Array:
    filled = (np.asarray(partition.slot_layers) >= 0).reshape(-1, *(1,) * (slots.ndim - 1))
    return slots if filled.all() else jnp.where(filled, slots, 0)

"""Biases of attention by distance, learned by bucket: near distances have one each, far ones share one (T5,
1910.10683, section 2.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int64

from jaxtron.layers.linear import normal
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain
from jaxtron.typing import Array, Float


def distance_buckets(num_buckets: int, max_distance: int, *, causal: bool) -> Int64[np.ndarray, "N"]:
    """The bucket of each distance of a key from a query, of -max_distance to max_distance; farther ones are as these.

    Of keys before a query, and where attention is not causal of as many buckets after it, half of the buckets are for
    one distance each, and the others grow with the logarithm up to `max_distance`.
    """
    distance = np.arange(-max_distance, max_distance + 1)
    first = np.zeros_like(distance)
    if not causal:
        num_buckets //= 2
        first = np.where(distance > 0, num_buckets, 0)
    far = np.maximum(-distance, 0) if causal else np.abs(distance)
    exact = num_buckets // 2
    # in float32, as released models were trained: a boundary is where its rounding says
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    shared = exact + (ratio * np.float32(num_buckets - exact)).astype(np.int64)
    return first + np.where(far < exact, far, np.minimum(shared, num_buckets - 1))


class DistanceBias(nnx.Module):
    """A number for each bucket and head, and what of it attention adds at each distance."""

    def __init__(
        self, num_heads: int, *, num_buckets: int, max_distance: int, causal: bool, std: float, rngs: nnx.Rngs
    ) -> None:
        self.buckets = tuple(map(int, distance_buckets(num_buckets, max_distance, causal=causal)))
        shape, axes = (num_buckets, num_heads), ("positions", "heads")
        self.table = parameter(rngs, normal(std), shape, axes=axes, role="bias")

    def __call__(self) -> Float[Array, "H N"]:
        """By head and distance, in float32, as `AttentionSpec.distance_bias` has it."""
        table = self.table[...].astype(jnp.float32)
        # a product, whose gradient is one too: nothing is scattered
        chosen = jax.nn.one_hot(jnp.asarray(self.buckets), table.shape[0], dtype=jnp.float32)
        return constrain(jnp.einsum("bh,nb->hn", table, chosen, precision=jax.lax.Precision.HIGHEST), "heads", None)

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


def signed_buckets(num_buckets: int, max_distance: int) -> Int64[np.ndarray, "N"]:
    """As `distance_buckets` of attention in both directions, with other edges (COCO-LM, 2102.08473).

    A bucket is as far after the middle one as that of the same distance on the other side is before it. Logarithms are
    rounded up, and that of `max_distance` - 1 is the last; the bucket of so many that is left over is not used.
    """
    distance = np.arange(-max_distance, max_distance + 1)
    last = num_buckets // 2 - 1
    exact = num_buckets // 4
    # in float32, as released models were trained: a boundary is where its rounding says
    far = np.maximum(np.abs(distance), exact).astype(np.float32)
    ratio = np.log(far / np.float32(exact)) / np.float32(np.log((max_distance - 1) / exact))
    shared = exact + np.ceil(ratio * np.float32(last - exact)).astype(np.int64)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(shared, last))
    return last + np.sign(distance) * bucket


class DistanceBias(nnx.Module):
    """A number for each bucket and head, and what of it attention adds at each distance; `buckets` has the bucket of
    each (none: T5's, `distance_buckets`)."""

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int,
        max_distance: int,
        causal: bool,
        std: float,
        rngs: nnx.Rngs,
        buckets: Int64[np.ndarray, "N"] | None = None,
    ) -> None:
        found = distance_buckets(num_buckets, max_distance, causal=causal) if buckets is None else buckets
        self.buckets = tuple(map(int, found))
        shape, axes = (num_buckets, num_heads), ("positions", "heads")
        self.table = parameter(rngs, normal(std), shape, axes=axes, role="bias")

    def __call__(self) -> Float[Array, "H N"]:
        """By head and distance, in float32, as `AttentionSpec.distance_bias` has it."""
        table = self.table[...].astype(jnp.float32)
        # a product, whose gradient is one too: nothing is scattered
        chosen = jax.nn.one_hot(jnp.asarray(self.buckets), table.shape[0], dtype=jnp.float32)
        return constrain(jnp.einsum("bh,nb->hn", table, chosen, precision=jax.lax.Precision.HIGHEST), "heads", None)

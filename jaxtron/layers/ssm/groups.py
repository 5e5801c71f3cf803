"""Heads in groups: what is of a group's heads lies beside what they share, so that one product makes both."""

import math

import jax
import jax.numpy as jnp

from jaxtron.layers.ssm.recurrences import HEADS
from jaxtron.sharding.rules import spec
from jaxtron.typing import Array, Float

BY_GROUP = ("batch", "full_seq", "groups", None)


def grouped(array: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "... G width"]:
    """[..., heads(, head dim)] as [..., groups, what is of a group's heads], laid out as `like`."""
    shape = (*like.shape[:-1], array.size // math.prod(like.shape[:-1]))
    return jnp.reshape(array, shape, out_sharding=jax.typeof(like).sharding.spec)


def by_head(x: Float[Array, "B S G width"], num_heads: int, *head_dim: int) -> Float[Array, "B S H ..."]:
    """The inverse for activations; without `head_dim` a number of each head."""
    shape = (*x.shape[:2], num_heads, *head_dim)
    return jnp.reshape(x, shape, out_sharding=spec(*HEADS[: len(shape)]))

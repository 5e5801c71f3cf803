"""What computes a family of models, for those who run it: what it reads, how it is built, and the pieces of it."""

import functools

import jax

from jaxtron.data.batch import batch_fields


@functools.cache
def as_pytree(batch_type: type) -> type:
    """The class of a batch, its arrays seen by JAX from now on; data that are only read need none."""
    return jax.tree_util.register_dataclass(batch_type, data_fields=list(batch_fields(batch_type)), meta_fields=[])

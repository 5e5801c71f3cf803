"""Documents of packed sequences, as a recurrence sees them: where one begins, its state is dropped."""

import jax.numpy as jnp

from jaxtron.sharding.context import before, pieces
from jaxtron.typing import Array, Bool, Int


def own_documents(segments: Int[Array, "B S"], width: int) -> Int[Array, "P T"]:
    """Numbers of documents in a device's pieces, with those of the `width` positions before each: T = piece + width."""
    ids = pieces(segments)
    return jnp.concatenate([before(ids, width), ids], 1)


def resets(segments: Int[Array, "B S"] | None) -> Bool[Array, "P T"] | None:
    """Where a document begins in a device's pieces; perhaps also at the first of all, where no state enters."""
    if segments is None:
        return None
    ids = own_documents(segments, 1)
    return ids[:, 1:] != ids[:, :-1]

"""Whether a state is worth keeping: no array of it has a NaN or an infinity."""

import jax
import jax.numpy as jnp

from jaxtron.checkpoint.names import parts
from jaxtron.typing import Array, Bool, PyTree


def first_not_finite(state: PyTree) -> str | None:
    """The name of the first array with a NaN or an infinity, such as `params.final_norm.scale`; None where all is well.

    Computed on the devices, in one pass over global arrays; all processes call this, and get the same.
    """
    arrays = [
        (".".join(parts(path)), leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if not arrays:
        return None
    finite = jax.device_get(_are_finite([leaf for _, leaf in arrays]))
    return next((name for (name, _), is_finite in zip(arrays, finite, strict=True) if not is_finite), None)


@jax.jit
def _are_finite(arrays: list[Array]) -> list[Bool[Array, ""]]:
    return [jnp.isfinite(array).all() for array in arrays]

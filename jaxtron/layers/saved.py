"""What a backward keeps: functions that keep their inputs alone, and arrays that a layer's policy keeps."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxtron.typing import Array

# the name of arrays that are not products and yet saved (`models/decoder/recompute.py`)
SAVED = "saved"


def checkpoint_inputs(function: Callable) -> Callable:
    """`function` of arrays, whose backward keeps its arguments and computes the rest again.

    Unlike a `jax.checkpoint` inside another, it is left alone by the outer one's policy.
    """
    run = jax.custom_vjp(function)
    run.defvjp(lambda *args: (function(*args), args), lambda args, cotangent: jax.vjp(function, *args)[1](cotangent))
    return run


def save_for_backward(x: Array) -> Array:
    """`x`, to be kept if a backward needs it, rather than computed again from what it was made of."""
    return checkpoint_name(x, SAVED)

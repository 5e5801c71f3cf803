"""Functions whose backward keeps their inputs alone."""

from collections.abc import Callable

import jax


def keeping_inputs(function: Callable) -> Callable:
    """`function` of arrays, whose backward keeps its arguments and computes the rest again.

    Unlike a `jax.checkpoint` inside another, it is left alone by the outer one's policy.
    """
    run = jax.custom_vjp(function)
    run.defvjp(lambda *args: (function(*args), args), lambda args, cotangent: jax.vjp(function, *args)[1](cotangent))
    return run

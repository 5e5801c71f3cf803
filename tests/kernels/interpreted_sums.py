"""Runs the Mosaic kernel that adds weight gradients in Pallas' interpreter, as `interpreted.py` does with attention's:
`python tests/kernels/interpreted_sums.py CASE ...`."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from interpreted import INTERPRETER, main

from jaxtron.kernels.weight_sums import mosaic, reference

# sums, rows, inputs, outputs, type
CASES: dict[str, tuple[int, int, int, int, str]] = {
    # several tiles a block; rows, inputs and outputs that are no whole tiles
    "ragged": (2, 130, 144, 352, "bfloat16"),
    "whole tiles": (3, 128, 128, 256, "bfloat16"),
    "narrow": (1, 40, 16, 16, "bfloat16"),
    "float16": (2, 64, 128, 192, "float16"),
}


def errors_of(name: str, blocks: int = 2) -> dict[str, float]:
    """The largest error of the sum that is added to, as a share of its largest number, and of all others."""
    number, rows, width, out, dtype = CASES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    sums = jax.random.normal(keys[0], (number, width, out))
    x, cotangent = (
        jax.random.normal(key, (rows, size)).astype(dtype) for key, size in zip(keys[1:], (width, out), strict=True)
    )
    slot = jnp.int32(number - 1)
    found = mosaic.add(sums, x, cotangent, slot, interpret=INTERPRETER, blocks=blocks)
    wrong = jnp.abs(found - reference.add(sums, x, cotangent, slot))
    largest = jnp.abs(x.astype(jnp.float32).T @ cotangent.astype(jnp.float32)).max()
    return {"sum": float(wrong[-1].max() / largest), "others": float(wrong[:-1].max(initial=0.0))}


RUNS: dict[str, Callable[[], Any]] = {
    "many blocks": functools.partial(errors_of, "ragged", 132),
    **{name: functools.partial(errors_of, name) for name in CASES},
}


if __name__ == "__main__":
    main(sys.argv[1:], RUNS)

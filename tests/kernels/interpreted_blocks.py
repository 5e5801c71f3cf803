"""Runs the Mosaic kernel for 8-bit blocks in Pallas' interpreter, as `interpreted.py` does with attention's:
`python tests/kernels/interpreted_blocks.py CASE ...`."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from interpreted import INTERPRETER, error, main

from jaxtron.kernels.block_products import mosaic, xla
from jaxtron.kernels.block_products.rounding import block_scales, by_blocks, by_rows, whole
from jaxtron.kernels.block_products.spec import Rounded

# parts, rows, columns, contracted of a part, whether the right has a scale for each row
CASES: dict[str, tuple[int, int, int, int, bool]] = {
    # a tile of 128 columns that fills its stages anew; a block's two tiles of 256
    "blocks": (1, 128, 128, 640, False),
    "tiles": (2, 128, 384, 256, True),
    # rows, columns and what is contracted that are no whole tiles
    "ragged blocks": (1, 130, 272, 272, False),
    "ragged tiles": (2, 130, 80, 144, True),
}


def operands(name: str) -> tuple[Rounded, Rounded]:
    """Numbers whose blocks differ by orders of magnitude."""
    parts, rows, columns, depth, by_tiles = CASES[name]
    keys = jax.random.split(jax.random.key(0), 4)

    def numbers(key: jax.Array, sizes: jax.Array, *shape: int) -> jax.Array:
        made = jax.random.normal(key, shape) * jnp.exp(2 * jax.random.normal(sizes, (*shape[:-1], 1)))
        return made.astype(jnp.bfloat16)

    def tiles(x: jax.Array) -> Rounded:
        values, scales = by_rows(x)
        return Rounded(values, jnp.swapaxes(scales, 0, 1))

    left = tiles(numbers(keys[0], keys[1], parts, rows, depth))
    if by_tiles:
        return left, tiles(numbers(keys[2], keys[3], parts, columns, depth))
    weights = numbers(keys[2], keys[3], columns, depth)
    scales = block_scales(weights)
    return left, whole(by_blocks(weights, scales), scales.T)


def errors_of(name: str, blocks: int = 2) -> dict[str, float]:
    """The largest error of the product, as a share of its largest number."""
    left, right = operands(name)
    found = mosaic.product(left, right, jnp.bfloat16, interpret=INTERPRETER, blocks=blocks)
    return {"product": error(found, xla.product(left, right, jnp.float32))}


RUNS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(errors_of, name) for name in CASES},
    "one block": functools.partial(errors_of, "tiles", 1),
}


if __name__ == "__main__":
    main(sys.argv[1:], RUNS)

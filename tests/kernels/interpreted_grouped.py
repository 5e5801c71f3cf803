"""Runs the Mosaic kernels of grouped products in Pallas' interpreter, as `interpreted.py` does with attention's:
`python tests/kernels/interpreted_grouped.py CASE ...`."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from interpreted import INTERPRETER, main
from test_grouped_matmul import CASES, Case, given, ratios

from jaxtron.kernels.grouped_matmul import mosaic

# several tiles a block, and several blocks
BLOCKS = 2
SHORT = Case((130, 0, 5), empty=1, width=64, out=48, dtype="bfloat16")
CASES = {
    "short": SHORT,
    # several tiles of columns, the last of which are not whole, and several steps
    "wide": replace(SHORT, width=208, out=336),
    # three pieces on their way out, which take turns in two places
    "odd": replace(SHORT, width=64, out=192),
    "narrow": replace(SHORT, width=16, out=32),
    "float16": replace(SHORT, dtype="float16"),
    **{
        name: replace(CASES[name], width=64, out=64, dtype="bfloat16")
        for name in ("ragged", "experts without rows", "all in one expert", "no rows", "one tile", "one expert")
    },
}


def errors_of(case: Case, blocks: int = BLOCKS) -> dict[str, float]:
    """Largest error of each product, as a share of what it may be."""
    arrays = given(case)
    rows, kernel, cotangent, experts = map(
        jnp.asarray, (arrays.rows, arrays.kernel, arrays.cotangent, arrays.tile_experts)
    )
    run: dict[str, Any] = {"interpret": INTERPRETER, "blocks": blocks}
    made = {
        "product": mosaic.product(rows, kernel, experts, **run),
        "product_transposed": mosaic.product_transposed(cotangent, kernel, experts, **run),
        "gradient": mosaic.gradient(rows, cotangent, experts, kernel.shape[0], **run),
    }
    return ratios(jax.block_until_ready(made), arrays)


RUNS: dict[str, Callable[[], Any]] = {
    "many blocks": functools.partial(errors_of, SHORT, 132),
    **{name: functools.partial(errors_of, case) for name, case in CASES.items()},
}


if __name__ == "__main__":
    main(sys.argv[1:], RUNS)

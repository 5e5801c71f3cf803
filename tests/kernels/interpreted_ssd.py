"""Runs the Mosaic kernels of state-space duality in Pallas' interpreter, as `interpreted.py` does with attention's:
`python tests/kernels/interpreted_ssd.py CASE ...`."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from interpreted import INTERPRETER, main
from test_ssd import GRADIENTS, PACKED, Case, errors, given

from jaxtron.kernels.ssd import mosaic

SHORT = Case(140, rows=1, heads=1, groups=1, width=64, size=64, dtype="bfloat16", resets=(70,))
PLAIN = Case(256, rows=1, heads=2, groups=1, width=64, size=128, dtype="bfloat16")
CASES = {
    "groups, resets, padding": replace(PLAIN, length=300, heads=4, groups=2, resets=(10, 150, 151, 299)),
    "states of 64, heads of 128": replace(PLAIN, size=64, width=128, rows=2, resets=(100,)),
    "heads of 80": replace(PLAIN, length=140, width=80, heads=1),
    "resets at edges": replace(PLAIN, length=384, heads=1, resets=(0, 127, 128, 130, 255, 383)),
    "one position": replace(PLAIN, length=1, groups=2),
    "slow decay": replace(PLAIN, dt=(1e-4, 1e-3), heads=1),
    "fast decay, poisoned padding": replace(PLAIN, dt=(0.5, 2.0), padding=100, heads=1, poisoned=True),
}


def errors_of(case: Case, pieces: int = 1, parts: int | None = None, *, summaries: bool = True) -> dict[str, float]:
    """Greatest error of each result, as a share of the greatest value."""
    arrays = given(case).arrays
    x, dt, A, B, C, D, initial, dy, dfinal = (
        jnp.asarray(arrays[name]) for name in ("x", "dt", "A", "B", "C", "D", "initial", "dy", "dfinal")
    )
    resets = None if arrays["resets"] is None else jnp.asarray(arrays["resets"])
    run: dict[str, Any] = {"interpret": INTERPRETER}
    y, final, states = mosaic.forward(x, dt, A, B, C, D, initial, resets, pieces=pieces, **run)
    gradients = mosaic.backward(x, dt, A, B, C, D, states, dy, dfinal, resets, pieces=pieces, parts=parts, **run)
    made = {"y": y, "final": final, **dict(zip(GRADIENTS, gradients, strict=True))}
    if summaries:
        made["final_state"] = mosaic.final_state(x, dt, A, B, initial, resets, **run)
        made["gradient_summary"] = mosaic.gradient_summary(dt, A, C, dy, dfinal, resets, **run)
    return errors(jax.block_until_ready(made), case)


RUNS: dict[str, Callable[[], Any]] = {
    "short": functools.partial(errors_of, SHORT, summaries=False),
    "shared heads": functools.partial(errors_of, replace(PLAIN, heads=4, resets=PACKED), parts=2),
    "pieces": functools.partial(
        errors_of, replace(PLAIN, length=500, heads=1, rows=2, resets=PACKED), pieces=2, summaries=False
    ),
    **{name: functools.partial(errors_of, case) for name, case in CASES.items()},
}


if __name__ == "__main__":
    main(sys.argv[1:], RUNS)

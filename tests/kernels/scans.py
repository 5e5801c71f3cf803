"""What the suites of scans share: documents of a batch, how far results are off, and cases by implementation."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

# compiling is most of the suites' time, and what LLVM makes faster is not what is tested
OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def documents(rows: int, length: int, places: tuple[int, ...]) -> np.ndarray:
    """[rows, length], true where a document begins: at these positions of the first row, one earlier in the next."""
    resets = np.zeros((rows, length), bool)
    for row in range(rows):
        here = np.array(places, int) - row
        resets[row, here[(here >= 0) & (here < length)]] = True
    return resets


def greatest_errors(
    made: Mapping[str, Any], exact: Mapping[str, np.ndarray], unread: Collection[str], real: int
) -> dict[str, float]:
    """Of each result the greatest error as a share of the greatest value; not-a-number is infinite.

    Of those in `unread` only the first `real` positions count: of padding nobody asks.
    """
    found = {}
    for name, array in made.items():
        values, array = exact[name], np.asarray(array, np.float64)
        assert array.shape == values.shape, name
        if name in unread:
            values, array = values[:, :real], array[:, :real]
        gaps = np.abs(array - values)
        found[name] = float(np.max(np.where(np.isnan(gaps), np.inf, gaps)) / max(np.abs(values).max(), 1e-30))
    return found


def with_each(cases: Mapping[str, Any], implementations: Callable[[Any], Iterable[str]]) -> pytest.MarkDecorator:
    """Every case with every implementation that computes it."""
    pairs = [
        pytest.param(case, name, id=f"{label}-{name}")
        for label, case in cases.items()
        for name in implementations(case)
    ]
    return pytest.mark.parametrize(("case", "name"), pairs)

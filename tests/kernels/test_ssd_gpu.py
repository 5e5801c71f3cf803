"""State-space duality by our kernels on a Hopper GPU: numbers against float64, and the same bits every time.

Elsewhere `JAXTRON_TEST_SSD=xla` runs the same checks of plain JAX, to test the tests.
"""

import functools
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from test_ssd import DEVICE_KIND, GRADIENTS, PACKED, TOLERANCE, Case, check_types, errors, given, results

from jaxtron.kernels.ssd.backend import IMPLEMENTATIONS

NAME = os.environ.get("JAXTRON_TEST_SSD", "mosaic")
_REFUSAL = IMPLEMENTATIONS[NAME].unsupported_reason(
    jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16),
    DEVICE_KIND,
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REFUSAL is not None, reason=str(_REFUSAL))]

PLAIN = Case(600, heads=4, groups=2, width=64, size=128, dtype="bfloat16")
CASES = {
    "plain": PLAIN,
    "packed": replace(PLAIN, resets=(*PACKED, 500, 599)),
    "one group": replace(PLAIN, groups=1, heads=6),
    "states of 64": replace(PLAIN, size=64, resets=(300,)),
    "heads of 128": replace(PLAIN, width=128, heads=2, resets=(300,)),
    "heads of 16": replace(PLAIN, width=16),
    "one position": replace(PLAIN, length=1),
    "whole chunks": replace(PLAIN, length=640),
    "more than a GPU's blocks": replace(PLAIN, length=256, rows=1, heads=150, groups=1, width=16, size=64),
    "pieces": replace(PLAIN, length=4096, rows=1, heads=1, groups=1, resets=(*PACKED, 2000, 2048)),
    "steps of 0": replace(PLAIN, padding=300),
    "slow decay": replace(PLAIN, dt=(1e-5, 1e-3)),
    "fast decay": replace(PLAIN, dt=(0.1, 1.0)),
}
REPEATS = 50 if jax.default_backend() == "gpu" else 1
QUICK = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}

made = functools.partial(jax.jit, compiler_options=QUICK)(
    functools.partial(results, implementation=IMPLEMENTATIONS[NAME])
)


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    arrays = given(CASES[name])
    out = made(arrays.arrays)
    check_types(out, arrays)
    found = errors(out, CASES[name])
    assert set(GRADIENTS) < set(found) and all(error <= TOLERANCE["bfloat16"] for error in found.values()), found


@pytest.mark.parametrize("case", [CASES["packed"], CASES["more than a GPU's blocks"]], ids=["packed", "large"])
def test_the_same_bits_every_time(case: Case) -> None:
    """A product that reads shared memory while the next copy fills it would show here, and sums in any order."""
    arrays = {name: None if array is None else jnp.asarray(array) for name, array in given(case).arrays.items()}

    @jax.jit
    def differences(first, again):
        return jax.tree.map(lambda a, b: jnp.sum(a != b), first, again)

    first = made(arrays)
    for _ in range(REPEATS):
        differing = differences(first, made(arrays))
        assert not any(jax.tree.leaves(differing)), differing

"""Grouped products by our kernels on a Hopper GPU: numbers against float64, and the same bits every time.

Elsewhere `JAXTRON_TEST_GROUPED=xla` runs the same checks of plain JAX, to test the tests.
"""

import functools
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from test_grouped_matmul import DEVICE_KIND, Case, Given, check, given, results

from jaxtron.kernels.grouped_matmul.backend import IMPLEMENTATIONS

IMPLEMENTATION = os.environ.get("JAXTRON_TEST_GROUPED", "mosaic")
_REFUSAL = IMPLEMENTATIONS[IMPLEMENTATION].unsupported_reason(
    jax.ShapeDtypeStruct((128, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64, 64), jnp.bfloat16), DEVICE_KIND
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REFUSAL is not None, reason=str(_REFUSAL))]

RAGGED = Case((130, 0, 1, 128, 700, 0, 300), empty=3, width=512, out=768, dtype="bfloat16")
# every width of tiles and of pieces on their way out, ends that are no whole tiles, more tiles than processors
CASES = {
    "ragged": RAGGED,
    "float16": replace(RAGGED, dtype="float16"),
    "all in one expert": replace(RAGGED, counts=(0, 0, 1500, 0)),
    "no rows": replace(RAGGED, counts=(0, 0, 0)),
    "one tile": replace(RAGGED, counts=(5,), empty=0),
    "many small experts": replace(RAGGED, counts=tuple(range(0, 200, 5)), empty=1),
    "one processor's tiles and one more": replace(RAGGED, counts=(133 * 128,), empty=0, width=64, out=256),
    **{
        f"{width} x {out}": replace(RAGGED, width=width, out=out)
        for width, out in ((64, 64), (192, 128), (704, 384), (352, 80), (16, 2048), (1408, 48), (208, 336))
    },
}
REPEATS = 50 if jax.default_backend() == "gpu" else 1
QUICK = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}


@functools.partial(jax.jit, compiler_options=QUICK)
def made(rows, kernel, cotangent, tile_experts):
    return results(rows, kernel, cotangent, tile_experts, name=IMPLEMENTATION)


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    arrays = given(CASES[name])
    check(made(arrays.rows, arrays.kernel, arrays.cotangent, arrays.tile_experts), arrays)


@pytest.mark.parametrize("widths", [(2048, 1536), (352, 80)], ids=str)
def test_the_same_bits_every_time(widths: tuple[int, int]) -> None:
    """A product that reads shared memory while the next copy fills it would show here: no interpreter finds that."""
    counts = tuple(int(count) for count in np.random.default_rng(0).integers(0, 900, 16))
    case = Case(counts, empty=2, width=widths[0], out=widths[1], dtype="bfloat16")
    given_on_device = given(case)
    operands = [jnp.asarray(getattr(given_on_device, name)) for name in ("rows", "kernel", "cotangent", "tile_experts")]

    @jax.jit
    def differences(first, again):
        return jax.tree.map(lambda a, b: jnp.sum(a != b), first, again)

    first = made(*operands)
    for _ in range(REPEATS):
        differing = differences(first, made(*operands))
        assert not any(jax.tree.leaves(differing)), differing


def test_inside_shard_map_and_a_loop() -> None:
    """As further rounds of an exchange run them: each device has its own rows, and as many turns as are needed."""
    count, arrays = len(jax.devices()), given(RAGGED)
    mesh, split = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")

    def body(rows, kernel, cotangent, tile_experts, turns):
        def turn(index, sums):
            again = results(rows, kernel, cotangent, tile_experts, name=IMPLEMENTATION)
            return jax.tree.map(lambda total, part: total + part / turns[0].astype(part.dtype), sums, again)

        zeros = jax.tree.map(jnp.zeros_like, results(rows, kernel, cotangent, tile_experts, name=IMPLEMENTATION))
        return jax.lax.fori_loop(0, turns[0], turn, zeros)

    run = jax.shard_map(body, mesh=mesh, in_specs=(split, PartitionSpec(), split, split, split), out_specs=split)
    several = [np.concatenate([array] * count) for array in (arrays.rows, arrays.cotangent, arrays.tile_experts)]
    # two turns of half each are exact
    out = jax.jit(run, compiler_options=QUICK)(
        several[0], arrays.kernel, several[1], several[2], np.full(count, 2, np.int32)
    )
    for number in range(count):
        mine = {name: np.split(np.asarray(array), count)[number] for name, array in out.items()}
        check(mine, Given(arrays.rows, arrays.kernel, arrays.cotangent, arrays.tile_experts))

"""Every implementation of grouped products against float64, and which of them is selected.

One suite for all: an implementation that refuses on this device says why, any other must compute every case."""

import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtron.config import UserError
from jaxtron.kernels.grouped_matmul import config, xla
from jaxtron.kernels.grouped_matmul.backend import IMPLEMENTATIONS, select_backend
from jaxtron.kernels.grouped_matmul.grouped_matmul import GroupedProducts, gradient, product, product_transposed
from jaxtron.kernels.grouped_matmul.spec import TILE, check_gradient, check_product

DEVICE_KIND = jax.devices()[0].device_kind
HERE = [
    name
    for name, module in IMPLEMENTATIONS.items()
    if module.unsupported_reason(
        jax.ShapeDtypeStruct((TILE, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64, 64), jnp.bfloat16), DEVICE_KIND
    )
    is None
]
# compiling is most of the suite's time, and what LLVM makes faster is not what is tested
OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
# the relative error of rounding to each type
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Case:
    """Rows of each expert before they are padded, tiles that are empty, and widths."""

    counts: tuple[int, ...]
    empty: int = 0
    width: int = 48
    out: int = 80
    dtype: str = "float32"


CASES = {
    "ragged": Case((130, 1, 128, 300), empty=2),
    "experts without rows": Case((0, 200, 0, 0, 128, 0), empty=1),
    "all in one expert": Case((0, 0, 500, 0), empty=1),
    "no rows": Case((0, 0, 0), empty=2),
    "no tiles": Case((0, 0)),
    "one tile": Case((5, 0)),
    "one expert": Case((300,), empty=1),
    "odd widths": Case((129, 7), width=33, out=1),
    "bfloat16": Case((130, 0, 140), empty=1, width=256, out=192, dtype="bfloat16"),
    "float16": Case((130, 0, 140), empty=1, width=256, out=192, dtype="float16"),
}


@dataclass(frozen=True)
class Given:
    """Arrays of a case. Tiles that are empty hold what no product may read."""

    rows: np.ndarray
    kernel: np.ndarray
    cotangent: np.ndarray
    tile_experts: np.ndarray


def given(case: Case) -> Given:
    generator = np.random.default_rng(0)
    tiles = [-(-count // TILE) for count in case.counts]
    experts = np.repeat(np.arange(len(tiles)), tiles)
    tile_experts = np.concatenate([experts, np.full(case.empty, len(tiles))]).astype(np.int32)

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(jnp.dtype(case.dtype))

    def grouped(width: int) -> np.ndarray:
        parts = [
            np.concatenate([normal(count, width), np.zeros((number * TILE - count, width), case.dtype)])
            for count, number in zip(case.counts, tiles, strict=True)
        ]
        return np.concatenate([*parts, np.full((case.empty * TILE, width), np.nan, case.dtype)])

    kernel = normal(len(tiles), case.width, case.out)
    return Given(grouped(case.width), kernel, grouped(case.out), tile_experts)


def wanted(arrays: Given) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Results by name in float64, and sums of the magnitudes of what is added up in each."""
    rows, kernel, cotangent = (
        np.nan_to_num(np.asarray(array, np.float64)) for array in (arrays.rows, arrays.kernel, arrays.cotangent)
    )
    experts = np.repeat(arrays.tile_experts, TILE)

    def results(rows: np.ndarray, kernel: np.ndarray, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        made = {
            "product": np.zeros_like(cotangent),
            "product_transposed": np.zeros_like(rows),
            "gradient": np.zeros_like(kernel),
        }
        for expert in range(len(kernel)):
            own = experts == expert
            made["product"][own] = rows[own] @ kernel[expert]
            made["product_transposed"][own] = cotangent[own] @ kernel[expert].T
            made["gradient"][expert] = rows[own].T @ cotangent[own]
        return made

    values, magnitudes = results(rows, kernel, cotangent), results(*map(np.abs, (rows, kernel, cotangent)))
    return {name: (values[name], magnitudes[name]) for name in values}


def results(
    rows: jax.Array, kernel: jax.Array, cotangent: jax.Array, tile_experts: jax.Array, *, name: str
) -> dict[str, jax.Array]:
    """All three products by one implementation."""
    implementation = IMPLEMENTATIONS[name]
    return {
        "product": product(rows, kernel, tile_experts, implementation),
        "product_transposed": product_transposed(cotangent, kernel, tile_experts, implementation),
        "gradient": gradient(rows, cotangent, tile_experts, kernel.shape[0], implementation),
    }


def ratios(made: Mapping[str, Any], arrays: Given) -> dict[str, float]:
    """Of each result the largest error, as a share of what float32 sums and the rounding of the result may make."""
    lengths = {
        "product": arrays.kernel.shape[1],
        "product_transposed": arrays.kernel.shape[2],
        "gradient": len(arrays.rows),
    }
    found = {}
    for name, (values, magnitudes) in wanted(arrays).items():
        dtype = "float32" if name == "gradient" else arrays.rows.dtype.name
        assert made[name].shape == values.shape and made[name].dtype == dtype
        bound = UNITS[dtype] * np.abs(values) + lengths[name] * UNITS["float32"] * magnitudes
        errors = np.abs(np.asarray(made[name], np.float64) - values)
        # where nothing is added up there is no error, not even a small one
        shares = np.where(bound > 0, errors / np.where(bound > 0, bound, 1.0), np.where(errors == 0, 0.0, np.inf))
        found[name] = float(np.max(shares, initial=0.0))
    return found


def check(made: Mapping[str, Any], arrays: Given) -> None:
    """Each number is as near as it must be; not-a-number is not."""
    assert all(ratio <= 1.0 for ratio in ratios(made, arrays).values()), ratios(made, arrays)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", HERE)
def test_products_and_gradients(name: str, case: str) -> None:
    arrays = given(CASES[case])
    run = jax.jit(functools.partial(results, name=name), compiler_options=OPTIONS)
    check(run(arrays.rows, arrays.kernel, arrays.cotangent, arrays.tile_experts), arrays)


@pytest.mark.parametrize("name", HERE)
def test_inside_a_region_whose_axes_are_manual(name: str) -> None:
    """Rows and their experts differ from device to device, kernels do not."""
    parts = [given(Case(counts, width=64, out=64)) for counts in ((130, 1, 0), (0, 0, 300))]
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = PartitionSpec("data")
    run = jax.shard_map(
        functools.partial(results, name=name),
        mesh=mesh,
        in_specs=(split, PartitionSpec(), split, split),
        out_specs={"product": split, "product_transposed": split, "gradient": split},
    )
    kernel = parts[0].kernel
    joined = [np.concatenate([getattr(part, of) for part in parts]) for of in ("rows", "cotangent", "tile_experts")]
    made = jax.jit(run, compiler_options=OPTIONS)(joined[0], kernel, joined[1], joined[2])
    for number, part in enumerate(parts):
        mine = {of: np.split(np.asarray(array), 2)[number] for of, array in made.items()}
        check(mine, Given(part.rows, kernel, part.cotangent, part.tile_experts))


def test_empty_tiles_cost_no_products(monkeypatch) -> None:
    multiply, calls = xla._multiply, []

    def counted(*operands):
        jax.debug.callback(lambda: calls.append(1))
        return multiply(*operands)

    monkeypatch.setattr(xla, "_multiply", counted)
    arrays = given(Case((200, 0, 128), empty=5))
    rows, kernel, tile_experts = map(jnp.asarray, (arrays.rows, arrays.kernel, arrays.tile_experts))
    jax.block_until_ready(product(rows, kernel, tile_experts, xla))
    jax.effects_barrier()
    assert len(calls) == 3


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


ROWS, KERNEL, TILES = shape(256, 64), shape(2, 64, 80), shape(2, dtype="int32")
REFUSED = {
    r"\(256, 48\) and \(2, 64, 80\).* does not fit: \[R, I\], \[N, I, O\]": (shape(256, 48), KERNEL, TILES),
    "of 200 rows: they must be a multiple of 128": (shape(200, 64), KERNEL, TILES),
    r"tiles' experts \(1,\), does not fit": (ROWS, KERNEL, shape(1, dtype="int32")),
    "of float32 and bfloat16: both": (ROWS, shape(2, 64, 80, dtype="bfloat16"), TILES),
    "of one type of bfloat16, float16, float32": (shape(256, 64, dtype="int8"), shape(2, 64, 80, dtype="int8"), TILES),
    "of type float32: they must be integers": (ROWS, KERNEL, shape(2)),
}


def test_what_does_not_fit_is_refused() -> None:
    check_product(ROWS, KERNEL, TILES)
    for words, (rows, kernel, tiles) in REFUSED.items():
        with pytest.raises(UserError, match=words):
            check_product(rows, kernel, tiles)
    with pytest.raises(UserError, match=r"\[R, O\], \[N, I, O\]"):
        check_product(ROWS, KERNEL, TILES, transposed=True)
    with pytest.raises(UserError, match=r"\[R, I\], \[R, O\]"):
        check_gradient(ROWS, shape(384, 64), TILES)


def test_every_implementation_is_one_and_has_a_name() -> None:
    assert ["auto", *IMPLEMENTATIONS] == list(typing.get_args(config.Implementation))
    for name, implementation in IMPLEMENTATIONS.items():
        assert isinstance(implementation, GroupedProducts), name


def select(name: str, device_kind: str, shape: tuple[int, int] = (2048, 1024), dtype: str = "bfloat16"):
    rows, kernel = jax.ShapeDtypeStruct((4096, shape[0]), dtype), jax.ShapeDtypeStruct((8, *shape), dtype)
    return select_backend(name, rows, kernel, device_kind)


H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def test_auto_takes_the_fastest_that_can_and_says_why() -> None:
    assert select("auto", H100).reason == f"grouped products: mosaic, the fastest that runs on {H100}"
    assert select("auto", A100).reason == (
        f"grouped products: xla, the fastest that runs on {A100}; "
        f"not mosaic: its kernels are for Hopper GPUs, not {A100}"
    )
    assert select("auto", "cpu").implementation is xla
    for sizes, dtype, words in (
        ((2048, 1024), "float32", "not mosaic: its kernels take bfloat16 and float16, not float32"),
        ((2048, 1000), "bfloat16", "take widths that are multiples of 16, not 2,048 x 1,000"),
        ((0, 1024), "bfloat16", "take no empty arrays"),
    ):
        backend = select("auto", H100, sizes, dtype)
        assert backend.implementation is xla and words in backend.reason


def test_a_named_one_is_taken_or_refused() -> None:
    assert select("reference", "cpu").reason == "grouped products: reference, as asked"
    assert select("xla", "NVIDIA H200").implementation is xla
    known = "model.moe.implementation fast is not known to grouped products: use one of auto, mosaic, xla, reference"
    with pytest.raises(UserError, match=known):
        select("fast", "cpu")
    with pytest.raises(
        UserError, match="implementation mosaic cannot: its kernels are for Hopper GPUs, not cpu; use auto"
    ):
        select("mosaic", "cpu")

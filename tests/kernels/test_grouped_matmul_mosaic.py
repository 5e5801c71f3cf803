"""The Mosaic kernels of grouped products: interpreted, for numbers and races, and compiled for GPUs that are not there.

Compiling needs ptxas of CUDA 13.0 or later on the path.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from test_mosaic_compiled import COLLECTIVES, WARNINGS
from test_mosaic_interpreted import interpret

from jaxtron.kernels.grouped_matmul import mosaic
from jaxtron.kernels.grouped_matmul.grouped_matmul import gradient, product, product_transposed
from jaxtron.kernels.grouped_matmul.mosaic_pipeline import place, tile_columns
from jaxtron.kernels.grouped_matmul.spec import TILE
from jaxtron.kernels.mosaic import processors
from jaxtron.kernels.varying import vary_alike
from jaxtron.plan.compiled.deviceless import gpu_devices

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter before JAX 0.11 lacks layouts and transposed operands"
)
PROGRAM = Path(__file__).with_name("interpreted_grouped.py")
SLOW = [
    "wide",
    "odd",
    "narrow",
    "float16",
    "ragged",
    "experts without rows",
    "all in one expert",
    "no rows",
    "one tile",
    "one expert",
    "many blocks",
]
KERNELS: dict[str, Callable] = {
    "product": lambda rows, cotangent, kernel, experts: product(rows, kernel, experts, mosaic),
    "product_transposed": lambda rows, cotangent, kernel, experts: product_transposed(
        cotangent, kernel, experts, mosaic
    ),
    "gradient": lambda rows, cotangent, kernel, experts: gradient(rows, cotangent, experts, EXPERTS, mosaic),
}
ROWS, EXPERTS = 4096, 8


def all_three(*operands: jax.Array) -> list[jax.Array]:
    return [kernel(*operands) for kernel in KERNELS.values()]


def check_numbers(names: list[str], seconds: int) -> None:
    for report in interpret(names, seconds, PROGRAM):
        assert not any(report["races"]), report
        assert set(report["errors"]) == set(KERNELS)
        assert all(share <= 1.0 for share in report["errors"].values()), report


@interpreted
def test_a_short_case_is_right_and_free_of_races() -> None:
    check_numbers(["short"], seconds=240)


@interpreted
@pytest.mark.slow
def test_every_case_is_right_and_free_of_races() -> None:
    check_numbers(SLOW, seconds=900)


def shapes(
    mesh: Mesh, widths: tuple[int, int], dtype: str = "bfloat16", axis: str | None = None
) -> list[jax.ShapeDtypeStruct]:
    """Rows, their cotangent, kernels, experts of tiles; rows and experts of all devices along `axis`."""
    parts = mesh.shape[axis] if axis else 1

    def array(shape: tuple[int, ...], dtype: str, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    return [
        *(array((parts * ROWS, width), dtype, PartitionSpec(axis)) for width in widths),
        array((EXPERTS, *widths), dtype, PartitionSpec()),
        array((parts * ROWS // TILE,), "int32", PartitionSpec(axis)),
    ]


@pytest.fixture
def said(monkeypatch, capfd) -> Callable[[], str]:
    """What ptxas said since, with the PTX."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    capfd.readouterr()
    return lambda: capfd.readouterr().out


def check_program(said: str, kernels: int) -> None:
    """No register is put aside, products are the tensor cores', and one is in flight while the next is issued."""
    spilled = [int(stored) for stored in re.findall(r"(\d+) bytes spill stores", said)]
    assert spilled == [0] * kernels
    assert said.count("wgmma.mma_async") >= 4 * kernels
    assert len(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+1;", said)) >= kernels
    assert not [warning for warning in WARNINGS if warning in said]


def one_gpu() -> Mesh:
    return Mesh(np.array(gpu_devices("h100", 1)), ("x",))


def test_kernels_compile_inside_a_manual_region_without_copies_and_collectives(said) -> None:
    """All three, over rows that differ from device to device."""
    mesh = Mesh(np.array(gpu_devices("h100", 8)).reshape(2, 4), ("data", "tensor"))
    given = shapes(mesh, (2048, 1536), axis="data")

    rows = PartitionSpec("data")
    region = jax.shard_map(
        all_three, mesh=mesh, in_specs=(rows, rows, PartitionSpec(), rows), out_specs=[rows, rows, rows]
    )
    compiled = jax.jit(region).lower(*given).compile()
    check_program(said(), kernels=3)
    text = compiled.as_text()
    assert all(f"mosaic.grouped_{name}.flops" in text for name in KERNELS)
    assert not COLLECTIVES.search(text)
    # a copy of anything would be megabytes
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


@pytest.mark.slow
def test_kernels_compile_in_a_loop_of_nested_regions(said) -> None:
    """As further rounds of an exchange: one region inside another, and as many turns as a device needs."""
    devices = np.array(gpu_devices("h100", 8)).reshape(2, 4)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    given = shapes(mesh, (512, 384), axis="data")
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local(turns: jax.Array, *operands: jax.Array) -> list[jax.Array]:
        # devices along tensor have tiles of their own
        experts = operands[3] + jax.lax.axis_index("tensor")
        operands = (*operands[:3], jax.lax.sort(experts))

        def add(_: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            return jax.tree.map(jnp.add, sums, all_three(*operands))

        sums = [jnp.zeros(made.shape, made.dtype) for made in jax.eval_shape(all_three, *operands)]
        sums, _ = vary_alike((sums, operands))
        return [array[None] for array in jax.lax.fori_loop(0, turns[0], add, sums)]

    def outer(turns: jax.Array, *operands: jax.Array) -> list[jax.Array]:
        parts = PartitionSpec("tensor")
        return jax.shard_map(local, in_specs=(whole,) * 5, out_specs=[parts] * 3, axis_names={"tensor"})(
            turns, *operands
        )

    turns = jax.ShapeDtypeStruct((2,), "int32", sharding=NamedSharding(mesh, rows))
    with jax.set_mesh(mesh):
        region = jax.shard_map(
            outer, in_specs=(rows, rows, rows, whole, rows), out_specs=[rows] * 3, axis_names={"data"}
        )
        compiled = jax.jit(region).lower(turns, *given).compile()
    check_program(said(), kernels=3)
    text = compiled.as_text()
    assert " while(" in text and not COLLECTIVES.search(text)


# tiles of 256, 192, 128 and 64 columns; widths that are no whole tiles or swizzles; one step
WIDTHS = ((4096, 2880), (384, 704), (128, 2816), (64, 192), (352, 80), (16, 2048))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "dtype"), [*((widths, "bfloat16") for widths in WIDTHS), ((384, 704), "float16")], ids=str
)
def test_every_width_compiles(said, widths: tuple[int, int], dtype: str) -> None:
    given = shapes(one_gpu(), widths, dtype)
    jax.jit(all_three).lower(*given).compile()
    check_program(said(), kernels=3)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 3), (16, 5), (17, 1)])
def test_every_tile_of_a_result_is_visited_once(rows: int, columns: int) -> None:
    found = jax.vmap(lambda index: place(index, np.int32(rows), columns))(np.arange(rows * columns, dtype=np.int32))
    places = list(zip(*map(np.ndarray.tolist, map(np.asarray, found)), strict=True))
    assert sorted(places) == [(row, column) for row in range(rows) for column in range(columns)]


def test_tiles_of_columns_fit_the_width() -> None:
    """Wide ones read least of the rows; narrower ones where a wide one would be mostly beyond the end."""
    widths = {4096: 256, 1408: 256, 384: 192, 128: 128, 96: 128, 64: 64, 16: 64}
    assert {width: tile_columns(width) for width in widths} == widths


def test_as_many_blocks_as_the_gpu_has_processors() -> None:
    """Where the program is traced for a mesh that knows them; a GPU that is not there has not said."""
    device = AbstractDevice(device_kind="NVIDIA H20", num_cores=78, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert processors() == 78
    with jax.set_mesh(one_gpu()):
        assert processors() == 132

"""Products of 8-bit numbers with scales of blocks: what the kernel takes, numbers and races, what is compiled.

Compiling needs ptxas of CUDA 13.0 or later on the path.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_grouped_matmul_mosaic import said  # noqa: F401 (a fixture)
from test_mosaic_compiled import COLLECTIVES, WARNINGS
from test_mosaic_interpreted import interpret
from test_mosaic_interpreted import pytestmark as interpreted

from jaxtron.kernels.block_products import mosaic
from jaxtron.kernels.block_products.backend import select_backend
from jaxtron.kernels.block_products.spec import Operand, Rounded
from jaxtron.plan.compiled.deviceless import gpu_devices

PROGRAM = Path(__file__).with_name("interpreted_blocks.py")
HOPPER = "NVIDIA H100 80GB HBM3"
# half a unit in the last place of bfloat16, and float32 sums in another order
MOST_ERROR = 2.0**-8 + 1e-5
# bytes of registers that ptxas put aside: what it was on JAX 0.11.2 and CUDA 13.0
SPILLED = {False: 44, True: 116}


def check_numbers(names: list[str], seconds: int) -> None:
    for report in interpret(names, seconds, PROGRAM):
        assert not any(report["races"]), report
        assert report["errors"]["product"] <= MOST_ERROR, report


@interpreted
def test_numbers_are_right_and_free_of_races() -> None:
    check_numbers(["blocks", "ragged tiles"], seconds=300)


@interpreted
@pytest.mark.slow
def test_every_case_is_right_and_free_of_races() -> None:
    check_numbers(["tiles", "ragged blocks", "one block"], seconds=900)


def operand(rows: int, depth: int, *, dtype: str = "float8_e4m3fn", blocks: bool = False) -> Operand:
    scales = jax.ShapeDtypeStruct((1, -(-depth // 128), -(-rows // 128) if blocks else rows), jnp.float32)
    return Operand(jax.ShapeDtypeStruct((1, rows, depth), jnp.dtype(dtype)), scales)


def test_the_kernel_is_for_results_of_whole_pieces_on_hopper() -> None:
    def reason(columns: int = 256, dtype: str = "bfloat16", device: str = HOPPER, rows: int = 100) -> str | None:
        return mosaic.unsupported_reason(operand(rows, 300), operand(columns, 300), jnp.dtype(dtype), device)

    assert reason() is None
    for told, found in {
        "for Hopper GPUs, not NVIDIA B200": reason(device="NVIDIA B200"),
        "makes bfloat16, not float32": reason(dtype="float32"),
        "a multiple of 16, not 250": reason(columns=250),
        "no empty arrays": reason(rows=0),
    }.items():
        assert found is not None and told in found


@pytest.mark.parametrize(
    ("dtype", "device", "name"),
    [("bfloat16", HOPPER, "mosaic"), ("float32", HOPPER, "xla"), ("bfloat16", "cpu", "xla")],
)
def test_what_can_is_taken(dtype: str, device: str, name: str) -> None:
    assert select_backend(jnp.dtype(dtype), device).name == name


@pytest.mark.parametrize("by_tiles", [False, True], ids=["blocks", "tiles"])
def test_a_part_of_a_region_is_one_kernel_of_8_bit_products(said: Callable[[], str], by_tiles: bool) -> None:  # noqa: F811
    mesh = Mesh(np.array(gpu_devices("h100", 4)).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    rows, columns, depth, parts = 1024, 1024, 1024, 2 if by_tiles else 1

    def array(shape: tuple[int, ...], dtype: str, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def local(left: Rounded, right: Rounded) -> jax.Array:
        of_right = Rounded(PartitionSpec(None, "tensor"), PartitionSpec(None, None, "tensor"))
        specs = (Rounded(PartitionSpec(), PartitionSpec()), of_right)
        multiply = lambda left, right: mosaic.product(left, right, jnp.bfloat16)  # noqa: E731
        return jax.shard_map(multiply, in_specs=specs, out_specs=PartitionSpec(None, "tensor"), axis_names={"tensor"})(
            left, right
        )

    with jax.set_mesh(mesh):
        of_left = Rounded(PartitionSpec(None, "data"), PartitionSpec(None, None, "data"))
        whole = Rounded(PartitionSpec(), PartitionSpec())
        region = jax.shard_map(local, in_specs=(of_left, whole), out_specs=PartitionSpec("data"), axis_names={"data"})
        left = Rounded(
            array((parts, 2 * rows, depth), "float8_e4m3fn", None, "data"),
            array((parts, depth // 128, 2 * rows), "float32", None, None, "data"),
        )
        scales = 2 * columns if by_tiles else 2 * columns // 128
        right = Rounded(
            array((parts, 2 * columns, depth), "float8_e4m3fn", None, "tensor"),
            array((parts, depth // 128, scales), "float32", None, None, "tensor"),
        )
        compiled = jax.jit(region).lower(left, right).compile()
    told = said()
    assert re.search(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", told) and "f32.bf16" not in told
    spilled = [int(stored) for stored in re.findall(r"(\d+) bytes spill stores", told)]
    assert spilled and max(spilled) <= SPILLED[by_tiles], spilled
    assert not [warning for warning in WARNINGS if warning in told]
    text = compiled.as_text() or ""
    assert len(re.findall(r"= bf16\[1024,1024\]\S* custom-call\(", text)) == 1 and not COLLECTIVES.search(text)

"""Weight gradients added by the products that make them: what the kernel takes, numbers and races, what is compiled.

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
from test_grouped_matmul_mosaic import check_program, said  # noqa: F401 (a fixture)
from test_mosaic_compiled import COLLECTIVES
from test_mosaic_interpreted import interpret

from jaxtron.config import UserError
from jaxtron.kernels.weight_sums import mosaic, reference
from jaxtron.kernels.weight_sums.backend import select_backend
from jaxtron.plan.compiled.deviceless import gpu_devices

PROGRAM = Path(__file__).with_name("interpreted_sums.py")
HOPPER = "NVIDIA H100 80GB HBM3"
# float32 sums in another order, of products that are exact in it
MOST_ERROR = 2e-6
recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX before 0.11 traces no kernel that writes in place"
)


def test_the_reference_adds_a_product_at_one_slot() -> None:
    sums = jnp.ones((3, 2, 2))
    x, cotangent = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    found = reference.add(sums, x, cotangent, jnp.int32(1))
    np.testing.assert_array_equal(found, [np.ones((2, 2)), [[2.0, 4.0], [3.0, 5.0]], np.ones((2, 2))])


def check_numbers(names: list[str], seconds: int) -> None:
    for report in interpret(names, seconds, PROGRAM):
        assert not any(report["races"]), report
        assert report["errors"]["sum"] <= MOST_ERROR and report["errors"]["others"] == 0.0, report


@recent
def test_numbers_are_right_and_free_of_races() -> None:
    check_numbers(["ragged", "float16"], seconds=240)


@recent
@pytest.mark.slow
def test_every_case_is_right_and_free_of_races() -> None:
    check_numbers(["whole tiles", "narrow", "many blocks"], seconds=600)


def operands(rows: int = 2048, width: int = 512, out: int = 512, dtype: str = "bfloat16") -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((rows, size), jnp.dtype(dtype)) for size in (width, out)]


@recent
def test_the_kernel_is_for_products_of_few_rows_on_hopper() -> None:
    assert mosaic.unsupported_reason(*operands(), HOPPER) is None
    reasons = {
        "for Hopper GPUs, not NVIDIA A100": mosaic.unsupported_reason(*operands(), "NVIDIA A100"),
        "not float32 and float32": mosaic.unsupported_reason(*operands(dtype="float32"), HOPPER),
        "up to 4,096 rows, not 8,192": mosaic.unsupported_reason(*operands(rows=8192), HOPPER),
        "multiples of 16, not 512 x 520": mosaic.unsupported_reason(*operands(out=520), HOPPER),
    }
    for told, reason in reasons.items():
        assert reason is not None and told in reason


@recent
@pytest.mark.parametrize(
    ("dtype", "device", "name"),
    [
        ("bfloat16", HOPPER, "mosaic"),
        ("float32", HOPPER, "xla"),
        ("bfloat16", "NVIDIA A100", "xla"),
        ("float32", "cpu", "xla"),
    ],
)
def test_auto_takes_the_kernel_where_it_can(dtype: str, device: str, name: str) -> None:
    found = select_backend("auto", 2048, jnp.dtype(dtype), device)
    assert (found.name, found.implementation) == (name, {"mosaic": mosaic, "xla": None}[name])


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="the kernel runs there")
def test_an_older_jax_adds_by_xla() -> None:
    found = select_backend("auto", 2048, jnp.bfloat16, HOPPER)
    assert found.implementation is None and "need JAX 0.11" in found.reason


def test_a_kernel_that_is_named_and_cannot_is_refused() -> None:
    with pytest.raises(
        UserError, match="^train.gradient_sums mosaic cannot: its kernels are for Hopper GPUs, not cpu; use auto$"
    ):
        select_backend("mosaic", 2048, jnp.bfloat16, "cpu")
    assert select_backend("xla", 2048, jnp.bfloat16, HOPPER).implementation is None
    # of many rows a sum costs little
    assert select_backend("auto", 8192, jnp.bfloat16, HOPPER).implementation is None


@recent
def test_sums_stay_where_they_are_in_loops_and_branches_of_regions(said: Callable[[], str]) -> None:  # noqa: F811
    """As in a step: over devices' own rows, parts along tensor, at slots that only the device knows."""
    mesh = Mesh(np.array(gpu_devices("h100", 8)).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    slots, rows, width, out = 8, 2048, 1024, 3200
    by_part = PartitionSpec(None, None, "tensor")

    def array(shape: tuple[int, ...], dtype: str, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def local(sums: jax.Array, x: jax.Array, cotangent: jax.Array, numbers: jax.Array) -> jax.Array:
        def body(index: jax.Array, sums: jax.Array) -> jax.Array:
            def work(sums: jax.Array) -> jax.Array:
                specs = (by_part, PartitionSpec(), PartitionSpec(None, "tensor"), PartitionSpec())
                add = jax.shard_map(mosaic.add, in_specs=specs, out_specs=by_part, axis_names={"tensor"})
                return add(sums, x[index], cotangent[index], numbers[0] + index)

            return jax.lax.cond(numbers[1] + index > 3, work, lambda sums: sums, sums)

        return jax.lax.fori_loop(0, 4, body, sums)

    with jax.set_mesh(mesh):
        of_device = PartitionSpec("data")
        region = jax.shard_map(local, in_specs=(of_device,) * 4, out_specs=of_device, axis_names={"data"})
        lowered = jax.jit(region, donate_argnums=0).lower(
            array((2 * slots, width, out), "float32", "data", None, "tensor"),
            array((8, rows, width), "bfloat16", "data"),
            array((8, rows, out), "bfloat16", "data", None, "tensor"),
            array((4,), "int32", "data"),
        )
        compiled = lowered.compile()
    check_program(said(), kernels=1)
    text = compiled.as_text() or ""
    (call,) = re.findall(r"mpmd_map\S* = f32\[8,1024,800\].* custom-call\(.*", text)
    assert "output_to_operand_aliasing={{}: (3, {})}" in call
    # what XLA's scheduler counts it as, in nanoseconds
    nanoseconds = re.search(r'latency_metadata="(\d+)"', call)
    assert nanoseconds is not None
    assert 2 * rows * width * 800 / 742e12 < 1e-9 * int(nanoseconds[1]) < 2 * rows * width * 800 / 500e12
    assert not COLLECTIVES.search(text) and not re.search(r"= f32\[8,1024,800\]\S* copy\(", text)
    # no more than the operands of one product, sliced
    assert compiled.memory_analysis().temp_size_in_bytes < 2.1 * rows * (width + out // 4)


@recent
@pytest.mark.slow
@pytest.mark.parametrize(("width", "out"), [(4096, 2880), (384, 704), (64, 192), (352, 80), (16, 2048)])
def test_every_width_compiles(said: Callable[[], str], width: int, out: int) -> None:  # noqa: F811
    mesh = Mesh(np.array(gpu_devices("h100", 1)), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    shapes = [((2, width, out), "float32"), ((1000, width), "bfloat16"), ((1000, out), "bfloat16"), ((), "int32")]
    given = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here) for shape, dtype in shapes]
    jax.jit(mosaic.add, donate_argnums=0).lower(*given).compile()
    check_program(said(), kernels=1)

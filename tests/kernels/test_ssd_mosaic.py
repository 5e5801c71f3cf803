"""The Mosaic kernels of state-space duality: interpreted, for numbers and races, and compiled for GPUs that are not
there.

Compiling needs ptxas of CUDA 13.0 or later on the path.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_mosaic_compiled import COLLECTIVES, SHARED_MEMORY, WARNINGS
from test_mosaic_interpreted import interpret
from test_ssd import TOLERANCE

from jaxtron.kernels.ssd import mosaic
from jaxtron.kernels.ssd.ssd import backward, final_state, forward
from jaxtron.plan.compiled.deviceless import gpu_devices

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter before JAX 0.11 lacks layouts and transposed operands"
)
PROGRAM = Path(__file__).with_name("interpreted_ssd.py")
SLOW = [
    "groups, resets, padding",
    "states of 64, heads of 128",
    "heads of 80",
    "resets at edges",
    "one position",
    "slow decay",
    "fast decay, poisoned padding",
    "shared heads",
    "pieces",
]
# products of a warpgroup on the tensor cores in each program, at N 128
PRODUCTS = {"forward": 28, "summary": 8, "backward": 44}
KERNELS = {"forward": 1, "summary": 1, "backward": 3}
# bytes of registers that ptxas put aside, all kernels together: what it was on JAX 0.11.2 and CUDA 13.0
SPILLED = {("backward", 128, True): 12}


def check_numbers(names: list[str], seconds: int) -> None:
    for report in interpret(names, seconds, PROGRAM):
        assert not any(report["races"]), report
        assert all(error <= TOLERANCE["bfloat16"] for error in report["errors"].values()), report


@interpreted
def test_a_short_case_is_right_and_free_of_races() -> None:
    check_numbers(["short"], seconds=240)


@interpreted
@pytest.mark.slow
def test_every_case_is_right_and_free_of_races() -> None:
    check_numbers(SLOW, seconds=900)


def shapes(
    mesh: Mesh,
    *,
    rows: int = 8,
    length: int = 4096,
    heads: int = 80,
    groups: int = 1,
    width: int = 64,
    size: int = 128,
    resets: bool = False,
    spec: tuple[str | None, str | None] = (None, None),
) -> dict[str, Any]:
    """What the functions are called with, by name; `spec` shards rows and heads."""
    over_rows, over_heads = spec

    def array(shape: tuple[int, ...], dtype: str, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    x = array((rows, length, heads, width), "bfloat16", over_rows, None, over_heads)
    keys = array((rows, length, groups, size), "bfloat16", over_rows)
    state = array((rows, heads, size, width), "float32", over_rows, over_heads)
    by_head = array((heads,), "float32", over_heads)
    states = (rows, -(-length // 128), heads * width // 64, size, 64)
    return {
        "x": x,
        "dt": array((rows, length, heads), "float32", over_rows, None, over_heads),
        "A": by_head,
        "B": keys,
        "C": keys,
        "D": by_head,
        "initial": state,
        "states": array(states, "bfloat16", over_rows, None, over_heads),
        "dy": x,
        "dfinal": state,
        "resets": array((rows, length), "bool", over_rows) if resets else None,
    }


def run_forward(given: dict[str, Any]) -> tuple:
    names = ("x", "dt", "A", "B", "C", "D", "initial", "resets")
    return forward(*(given[name] for name in names), mosaic)


def run_summary(given: dict[str, Any]) -> jax.Array:
    return final_state(*(given[name] for name in ("x", "dt", "A", "B", "initial", "resets")), mosaic)


def run_backward(given: dict[str, Any]) -> tuple:
    names = ("x", "dt", "A", "B", "C", "D", "states", "dy", "dfinal", "resets")
    return backward(*(given[name] for name in names), mosaic)


def run_both(given: dict[str, Any]) -> tuple:
    y, final, states = run_forward(given)
    return y, final, run_backward(given | {"states": states})


PROGRAMS: dict[str, Callable] = {"forward": run_forward, "summary": run_summary, "backward": run_backward}


def one_gpu(gpu: str = "h100") -> Mesh:
    return Mesh(np.array(gpu_devices(gpu, 1)), ("x",))


@pytest.fixture
def dumps(monkeypatch, tmp_path) -> Path:
    """A folder in which each kernel that is compiled leaves its PTX, what ptxas said, and its shared memory."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    return tmp_path


def check_program(dumps: Path, program: str, size: int, *, resets: bool) -> None:
    ptx, said, resources = (
        [file.read_text() for file in sorted(dumps.glob(f"*{suffix}"))]
        for suffix in (".ptx", ".ptxas", "resources.txt")
    )
    assert len(ptx) == len(said) == KERNELS[program]
    # JAX before 0.11 does not say how much shared memory it takes
    assert len(resources) == (KERNELS[program] if jax.__version_info__ >= (0, 11) else 0)
    # ptxas may report a kernel twice
    spilled = [re.findall(r"(\d+) bytes spill stores", text)[-1] for text in said]
    assert sum(map(int, spilled)) <= SPILLED.get((program, size, resets), 0), spilled
    assert not [warning for warning in WARNINGS if any(warning in text for text in said)]
    if size == 128:
        assert sum(text.count("wgmma.mma_async") for text in ptx) == PRODUCTS[program]
    for text in resources:
        found = re.search(r"smem_scratch_bytes=(\d+)", text)
        assert found and 0 < int(found[1]) <= SHARED_MEMORY


def test_forward_compiles_inside_a_manual_region_without_collectives(dumps: Path) -> None:
    """Rows and heads differ from device to device, B and C along the axis of heads do not."""
    mesh = Mesh(np.array(gpu_devices("h100", 8)).reshape(2, 4), ("data", "tensor"))
    check_region(mesh, "forward", run_forward)
    check_program(dumps, "forward", 128, resets=True)


@pytest.mark.slow
def test_backward_compiles_inside_a_manual_region_without_collectives(dumps: Path) -> None:
    mesh = Mesh(np.array(gpu_devices("h100", 8)).reshape(2, 4), ("data", "tensor"))
    check_region(mesh, "backward", run_backward)
    check_program(dumps, "backward", 128, resets=True)


def check_region(mesh: Mesh, name: str, program: Callable) -> None:
    given = shapes(mesh, rows=16, heads=320, resets=True, spec=("data", "tensor"))
    heads = PartitionSpec("data", None, "tensor")
    state, each = PartitionSpec("data", "tensor"), PartitionSpec(("data", "tensor"))

    def local(given: dict[str, Any]) -> tuple:
        if name == "forward":
            return program(given)
        dx, ddt, dA, dB, dC, dD, dinitial = program(given)
        # of these each device has a summand
        return dx, ddt, dinitial, *(array[None] for array in (dA, dB, dC, dD))

    out = (heads, state, heads) if name == "forward" else (heads, heads, state, each, each, each, each)
    specs = {key: None if array is None else array.sharding.spec for key, array in given.items()}
    run = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out)
    text = jax.jit(run).lower(given).compile().as_text()
    assert "mosaic_gpu" in text and not COLLECTIVES.search(text)


CONFIGURATIONS = [
    (program, size, width, resets)
    for program in PROGRAMS
    for size, width, resets in ((128, 64, False), (128, 128, True), (64, 64, False), (64, 64, True))
]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "size", "width", "resets"), CONFIGURATIONS)
def test_every_configuration_compiles(dumps: Path, program: str, size: int, width: int, resets: bool) -> None:
    given = shapes(one_gpu("h200" if resets else "h100"), size=size, width=width, resets=resets)
    jax.jit(PROGRAMS[program]).lower(given).compile()
    check_program(dumps, program, size, resets=resets)


@pytest.mark.slow
def test_memory_is_linear_in_the_length() -> None:
    """Of a forward and a backward."""
    temporary = {}
    for length in (8, 32, 128):
        given = shapes(one_gpu(), rows=1, length=length * 1024, resets=True)
        compiled = jax.jit(run_both).lower({**given, "states": None}).compile()
        temporary[length] = compiled.memory_analysis().temp_size_in_bytes
    x = 1024 * 80 * 64 * 2
    # states and their gradients are as much as x each; what else there is are numbers by head and position
    assert all(size < 3 * x * length for length, size in temporary.items()), temporary


def test_pieces_and_parts_fill_a_gpu() -> None:
    def pieces(rows: int, length: int, heads: int, width: int = 64) -> int:
        return mosaic.pieces_of(jax.ShapeDtypeStruct((rows, length, heads, width), jnp.bfloat16))

    # a block a head and row is enough of them, or nearly so
    assert pieces(8, 4096, 80) == pieces(1, 4096, 132) == pieces(1, 4096, 100) == 1
    # 32 heads leave three of four processors idle
    assert pieces(1, 4096, 32) == pieces(1, 4096, 16, 128) == 4
    # pieces are whole chunks, and not too short
    assert pieces(1, 129 * 128, 32) == 3
    assert pieces(1, 512, 4) == pieces(1, 1, 1) == 1

    def parts(rows: int, length: int, heads: int, groups: int) -> int:
        x, B = (jax.ShapeDtypeStruct((rows, length, count, 64), jnp.bfloat16) for count in (heads, groups))
        return mosaic.parts_of(x, B)

    # 264 blocks at least: rows times chunks times groups times parts
    assert parts(8, 4096, 80, 1) == 2 and parts(8, 4096, 80, 8) == 1
    assert parts(1, 1024, 12, 1) == 12

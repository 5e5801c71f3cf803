"""Mosaic attention compiled for Hopper GPUs that are not there: spilled registers, warnings, shared memory, wgmma.

Needs ptxas of CUDA 13.0 or later on the path.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.kernels.attention import mosaic
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.plan.compiled.deviceless import gpu_devices

HEADS = {"64": (64, 64), "96": (96, 96), "128": (128, 128), "192": (192, 128), "256": (256, 256)}
LENGTH = 1024
FEATURES = ("causal", "full", "window", "soft cap", "slopes", "segments", "dropout", "everything", "padded")
# above 128 the backward is the deterministic one
KERNELS = [
    (direction, heads)
    for direction in ("forward", "backward", "deterministic")
    for heads in HEADS
    if direction != "backward" or heads in ("64", "96", "128")
]
# bytes of registers that ptxas put aside, all kernels of a backward together: what it was on JAX 0.11.2 and CUDA 13.0
SPILLED = {
    ("backward", "96", "soft cap"): 72,
    ("backward", "96", "dropout"): 56,
    ("backward", "96", "everything"): 96,
    ("backward", "128", "causal"): 8,
    ("backward", "128", "window"): 8,
    ("backward", "128", "soft cap"): 144,
    ("backward", "128", "slopes"): 16,
    ("backward", "128", "segments"): 16,
    ("backward", "128", "dropout"): 60,
    ("backward", "128", "everything"): 160,
    ("backward", "128", "padded"): 24,
    ("deterministic", "96", "soft cap"): 32,
    ("deterministic", "96", "dropout"): 12,
    ("deterministic", "96", "everything"): 60,
    ("deterministic", "128", "soft cap"): 88,
    ("deterministic", "128", "dropout"): 56,
    ("deterministic", "128", "everything"): 112,
    ("deterministic", "256", "causal"): 560,
    ("deterministic", "256", "full"): 108,
    ("deterministic", "256", "window"): 560,
    ("deterministic", "256", "soft cap"): 940,
    ("deterministic", "256", "slopes"): 620,
    ("deterministic", "256", "segments"): 568,
    ("deterministic", "256", "dropout"): 680,
    ("deterministic", "256", "everything"): 1064,
    ("deterministic", "256", "padded"): 664,
}
WARNINGS = ("C7504", "C7508", "C7510", "C7512")
SHARED_MEMORY = 232448
COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


def spec_of(feature: str, segments: Any, slopes: Any, seeds: Any) -> AttentionSpec:
    """The spec of a name in `FEATURES`; everything is all that scores are made and masked by."""
    documents = {"q_segment_ids": segments, "kv_segment_ids": segments}
    return {
        "causal": AttentionSpec(),
        "full": AttentionSpec(causal=False),
        "window": AttentionSpec(window=300),
        "soft cap": AttentionSpec(logits_soft_cap=30.0),
        "slopes": AttentionSpec(alibi_slopes=slopes),
        "segments": AttentionSpec(**documents),
        "dropout": AttentionSpec(dropout_rate=0.1, dropout_seeds=seeds),
        "padded": AttentionSpec(),
        "everything": AttentionSpec(window=300, logits_soft_cap=30.0, alibi_slopes=slopes, **documents),
    }[feature]


def program(direction: str, feature: str) -> Callable:
    """The kernels of one direction, as a function of `shapes`' arrays."""

    def run(q: Any, k: Any, v: Any, lse: Any, dout: Any, *of_spec: Any) -> Any:
        spec = spec_of(feature, *of_spec)
        if direction == "forward":
            return mosaic.forward(q, k, v, spec)
        return mosaic.backward(q, k, v, lse, lse, dout, replace(spec, deterministic=direction == "deterministic"))

    return run


def shapes(
    mesh: Mesh, heads: str, dtype: str = "bfloat16", spec: tuple = (None, None), length: int = LENGTH
) -> list[jax.ShapeDtypeStruct]:
    """Queries, keys, values, log-sum-exp, gradient of the output, segments, slopes, dropout's seeds; `spec` shards rows
    and heads."""
    head_dim, value_dim = HEADS[heads]
    rows, head = spec

    def array(shape: tuple[int, ...], dtype: str, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    return [
        array((2, length, 8, head_dim), dtype, rows, None, head),
        array((2, length, 4, head_dim), dtype, rows, None, head),
        array((2, length, 4, value_dim), dtype, rows, None, head),
        array((2, 8, length), "float32", rows, head),
        array((2, length, 8, value_dim), dtype, rows, None, head),
        array((2, length), "int32", rows),
        array((8,), "float32", head),
        array((2, 8, 2), "uint32", rows, head),
    ]


def one_gpu(gpu: str) -> Mesh:
    return Mesh(np.array(gpu_devices(gpu, 1)), ("x",))


@pytest.fixture
def compile_for(monkeypatch, capfd) -> Callable[..., str]:
    """Compiles for a GPU and returns what ptxas said and the PTX."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

    def compiled(gpu: str, direction: str, heads: str, feature: str, dtype: str = "bfloat16") -> str:
        capfd.readouterr()
        # no multiple of a tile: the kernels spec their padding
        length = 1000 if feature == "padded" else LENGTH
        given = shapes(one_gpu(gpu), heads, dtype, length=length)
        jax.jit(program(direction, feature)).lower(*given).compile()
        return capfd.readouterr().out

    return compiled


def check(said: str, direction: str, heads: str, feature: str) -> None:
    spilled = [int(stored) for stored in re.findall(r"(\d+) bytes spill stores", said)]
    assert said.count("wgmma.mma_async") > 0 and spilled, said[-2000:]
    assert not [warning for warning in WARNINGS if warning in said]
    # ptxas reports a kernel that spills twice
    total = sum(part for number, part in enumerate(spilled) if not (number and part and spilled[number - 1] == part))
    assert total <= SPILLED.get((direction, heads, feature), 0), f"{direction} {heads} {feature}: {total} bytes spilled"


@pytest.mark.parametrize(
    ("gpu", "direction", "heads", "feature"),
    [
        ("h100", "forward", "128", "causal"),
        ("h200", "forward", "64", "segments"),
        ("h100", "backward", "128", "causal"),
        ("h100", "forward", "128", "dropout"),
        ("h100", "backward", "64", "dropout"),
        ("h100", "backward", "128", "dropout"),
        ("h200", "deterministic", "64", "causal"),
    ],
)
def test_kernels_compile_for_hopper(compile_for, gpu: str, direction: str, heads: str, feature: str) -> None:
    check(compile_for(gpu, direction, heads, feature), direction, heads, feature)


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("direction", "heads"), KERNELS)
def test_every_configuration_compiles(compile_for, direction: str, heads: str, feature: str) -> None:
    check(compile_for("h200", direction, heads, feature), direction, heads, feature)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward", "deterministic"])
def test_float16_compiles(compile_for, direction: str) -> None:
    check(compile_for("h100", direction, "128", "causal", "float16"), direction, "128", "causal")


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "heads"), KERNELS)
def test_shared_memory_is_within_the_limit(monkeypatch, tmp_path, direction: str, heads: str) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    jax.jit(program(direction, "causal")).lower(*shapes(one_gpu("h100"), heads)).compile()
    files = list(tmp_path.glob("*resources.txt"))
    assert files
    for file in files:
        size = re.search(r"smem_scratch_bytes=(\d+)", file.read_text())
        assert size and 0 < int(size[1]) <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("direction", "feature"),
    [
        ("forward", "everything"),
        pytest.param("backward", "everything", marks=pytest.mark.slow),
        ("backward", "dropout"),
    ],
)
def test_no_collective_inside_shard_map_over_rows_and_heads(direction: str, feature: str) -> None:
    mesh = Mesh(np.array(gpu_devices("h100", 8)).reshape(2, 4), ("data", "tensor"))
    sharded = shapes(mesh, "64", spec=("data", "tensor"))
    specs = tuple(array.sharding.spec for array in sharded)
    out = P("data", None, "tensor")
    run = jax.shard_map(
        program(direction, feature),
        mesh=mesh,
        in_specs=specs,
        out_specs=(out, P("data", "tensor")) if direction == "forward" else (out, out, out),
    )
    text = jax.jit(run).lower(*sharded).compile().as_text()
    assert "mosaic_gpu" in text and not COLLECTIVES.search(text)


def test_refusals_say_why() -> None:
    def array(dtype: Any, width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, 8, 2, width), dtype)

    def why(dtype: Any = jnp.bfloat16, width: int = 128, kind: str = "NVIDIA H200") -> str | None:
        given = array(dtype, width)
        return mosaic.unsupported_reason(given, given, given, AttentionSpec(), kind)

    assert why() is None
    assert why(dtype=jnp.float16, width=96, kind="NVIDIA H100 80GB HBM3") is None
    assert "float32" in str(why(dtype=jnp.float32))
    assert "512" in str(why(width=512))
    assert "A100" in str(why(kind="NVIDIA A100-SXM4-80GB"))

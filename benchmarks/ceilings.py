"""`python -m benchmarks.ceilings`: what this GPU does at best, a large matrix product and a copy, as JSON."""

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def main() -> None:
    """Prints both ceilings."""
    print(json.dumps({"device": jax.devices()[0].device_kind, **matmul(8192), **copy(2**31)}, indent=1))


def device_seconds(function: Callable[..., Any], *arguments: Any, rounds: int = 5, round_seconds: float = 0.3) -> float:
    """Median seconds of a call, over rounds of calls in flight together so that dispatch is not what is timed."""
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = min(max(math.ceil(round_seconds / (time.perf_counter() - start)), 1), 200)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            last = function(*arguments)
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def matmul(size: int) -> dict[str, Any]:
    """TFLOP/s of a square bf16 product of random normal numbers (zeros would run faster than real data does)."""
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    seconds = device_seconds(jax.jit(jnp.matmul), left, right)
    return {"matmul_size": size, "matmul_milliseconds": 1e3 * seconds, "matmul_tflops": 2e-12 * size**3 / seconds}


def copy(num_bytes: int) -> dict[str, Any]:
    """GB/s of a copy within the device's memory, bytes read and bytes written both counted."""
    source = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    seconds = device_seconds(jax.jit(jnp.copy), source)
    return {"copy_bytes": num_bytes, "copy_gigabytes_per_second": 2e-9 * num_bytes / seconds}


if __name__ == "__main__":
    main()

"""`python -m benchmarks.ceilings [CONFIG.yaml]`: what this GPU does at best, as JSON.

A large matrix product and a copy; of a configuration, the products of its model's own shapes.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.command import configure, run_command
from jaxtron.models.work.operations import Product
from jaxtron.models.work.profile import JAXTRON
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.run.configuration import Configuration


def main(argv: Sequence[str]) -> int:
    """Prints both ceilings, and that of every product of a configuration's model; anew after each product."""
    purpose = "Measure what this GPU does at best: a large product, a copy, and the products of a model's own shapes."
    config = configure(Configuration, argv, program="python -m benchmarks.ceilings", purpose=purpose)
    if config is None:
        return 0
    device = jax.devices()[0]
    result: dict[str, Any] = {"platform": device.platform, "device": device.device_kind, **matmul(8192), **copy(2**31)}
    print(json.dumps(result), flush=True)
    if argv:
        result["products"] = []
        for product in products(config, device.device_kind):
            result["products"].append(measure(product))
            print(json.dumps(result), flush=True)
    return 0


def products(config: Configuration, device_kind: str) -> list[Product]:
    """The different bf16 products of a microbatch on one device, forward, backward and of weights, the largest first.

    As a plan counts them; several devices have smaller ones. Empty for a family whose work is not known.
    """
    if config.family.work is None:
        return []
    resolved = config.resolved()
    work = work_of(resolved, shapes_of(resolved, resolved.mesh.shape(1), JAXTRON, device_kind))
    pieces = [work.head, *(stack.layer for stack in work.stacks)]
    found = [
        product
        for piece in pieces
        for phase in (piece.forward, piece.backward, piece.weight)
        for product in phase.products
    ]
    different = {(product.m, product.n, product.k): product for product in found if product.count == 1}
    return sorted(different.values(), key=lambda product: product.flops, reverse=True)


def measure(product: Product) -> dict[str, Any]:
    """TFLOP/s of one product of random normal numbers, rows times columns of bf16."""
    m, n, k = (round(size) for size in (product.m, product.n, product.k))
    left, right = (jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) for shape in ((m, k), (k, n)))
    seconds = device_seconds(jax.jit(jnp.matmul), left, right, round_seconds=0.1)
    return {"m": m, "n": n, "k": k, "milliseconds": 1e3 * seconds, "tflops": 2e-12 * m * n * k / seconds}


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
    sys.exit(run_command(main))

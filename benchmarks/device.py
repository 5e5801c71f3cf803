"""`python -m benchmarks.device`: whether JAX starts on this machine's GPU and multiplies there, and what it is."""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version

from jaxtron.command import run_command
from jaxtron.config import UserError


def main(argv: Sequence[str]) -> None:
    """Prints, as JSON, the devices, what JAX says of itself and its CUDA, and how long a first product took."""
    argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__).parse_args(argv)
    start = time.perf_counter()
    devices = jax.devices()
    if devices[0].platform != "gpu":
        raise UserError(f"JAX started on the {devices[0].platform} alone, and on no GPU")
    started = time.perf_counter()
    # of ones, whose product is exact: 64 in each place
    product = jnp.ones((64, 64), jnp.bfloat16) @ jnp.ones((64, 64), jnp.bfloat16)
    if not bool((product == 64).all()):
        raise UserError("a product of ones is wrong on this GPU")
    runtime = devices[0].client.platform_version.splitlines()
    result = {
        "kind": devices[0].device_kind,
        "count": len(devices),
        "compute_capability": getattr(devices[0], "compute_capability", None),
        "pool_bytes": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "runtime": runtime,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__, **cuda_version(runtime)},
        "start_seconds": round(started - start, 3),
        "product_seconds": round(time.perf_counter() - started, 3),
    }
    print(json.dumps(result, indent=1))


def cuda_version(runtime: Sequence[str]) -> dict[str, Any]:
    """The CUDA that JAX runs with, of lines such as `cuda 13000`; nothing where it does not say."""
    found = next((match for line in runtime if (match := re.match(r"cuda (\d+)(\d\d)\d$", line.strip()))), None)
    return {"cuda_runtime": f"{int(found[1])}.{int(found[2])}"} if found else {}


if __name__ == "__main__":
    sys.exit(run_command(main))

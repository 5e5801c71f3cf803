"""`python -m benchmarks.attention`: cuDNN's attention as JAX offers it, forward and backward, as JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.ceilings import device_seconds

Implementation = Literal["cudnn", "xla"]


@dataclass(frozen=True)
class Case:
    """Self-attention over `tokens` in sequences of `length`, heads of `head_dim` filling `hidden`."""

    length: int
    head_dim: int
    causal: bool
    tokens: int = 16384
    hidden: int = 2048

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, sequence, heads, head dimension."""
        return self.tokens // self.length, self.length, self.hidden // self.head_dim, self.head_dim

    @property
    def flops(self) -> float:
        """Of the forward, half of the scores where causal; the backward has 5 products for its 2."""
        return 4.0 * self.tokens * self.length * self.hidden * (0.5 if self.causal else 1.0)


CASES = tuple(
    Case(length, head_dim, causal)
    for length, causal in ((4096, True), (16384, True), (4096, False))
    for head_dim in (64, 128)
)


def main() -> None:
    """Prints every case with cuDNN."""
    print(json.dumps(report({"cudnn": partial(measure, implementation="cudnn")}), indent=1))


def report(implementations: dict[str, Callable[[Case], tuple[float, float]]]) -> dict[str, Any]:
    """Every case of every implementation: milliseconds and TFLOP/s, or why the library refused it."""
    return {
        "cases": [asdict(case) | _outcome(name, run, case) for name, run in implementations.items() for case in CASES]
    }


def _outcome(name: str, run: Callable[[Case], tuple[float, float]], case: Case) -> dict[str, Any]:
    try:
        forward, backward = run(case)
    # a library may refuse a case in its own way; the others still count
    except Exception as error:
        return {"implementation": name, "error": f"{type(error).__name__}: {error}"[:300]}
    return {
        "implementation": name,
        "forward_milliseconds": 1e3 * forward,
        "forward_tflops": 1e-12 * case.flops / forward,
        "backward_milliseconds": 1e3 * backward,
        "backward_tflops": 2.5e-12 * case.flops / backward,
    }


def measure(case: Case, implementation: Implementation) -> tuple[float, float]:
    """Seconds of the forward, and of the backward alone, in bf16 on random normal numbers."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, cotangent = (jax.random.normal(k, case.shape, jnp.bfloat16) for k in keys)
    attend = partial(jax.nn.dot_product_attention, is_causal=case.causal, implementation=implementation)
    forward = device_seconds(jax.jit(attend), query, key, value)
    _, pull = jax.jit(partial(jax.vjp, attend))(query, key, value)
    return forward, device_seconds(jax.jit(lambda pull, cotangent: pull(cotangent)), pull, cotangent)


if __name__ == "__main__":
    main()

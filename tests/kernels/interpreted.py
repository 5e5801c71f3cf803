"""Runs Mosaic kernels in Pallas' interpreter and prints a line of JSON per case; a process of its own, so that a wrong
barrier can hang this one only: `python tests/kernels/interpreted.py CASE ...`."""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensor_cores  # noqa: F401
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtron.kernels.attention import dropout, mosaic
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.dropout import scale as dropout_scale

# memory that nobody wrote is NaN: what is read of it shows; copies and products that share a clock seem to be in order
INTERPRETER = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", num_tma_threads_per_device=512)


@dataclass(frozen=True)
class Case:
    """Sizes and spec of one call; `segments` cuts queries and keys there, `slopes` are powers of two; what is dropped
    at the spec's rate differs by row and head."""

    rows: int = 1
    queries: int = 200
    keys: int = 200
    head_dim: int = 64
    value_dim: int = 64
    heads: int = 2
    kv_heads: int = 1
    dtype: str = "bfloat16"
    spec: AttentionSpec = AttentionSpec()
    segments: tuple[int, ...] = ()
    slopes: bool = False
    backward: bool = False
    deterministic: bool = False


EVERYTHING = Case(
    queries=100,
    keys=150,
    spec=AttentionSpec(window=90, logits_soft_cap=3.0, q_offset=32, logits_scale=0.2, dropout_rate=0.25),
    segments=(40, 110),
    slopes=True,
)
FORWARD = {
    "causal": Case(),
    "everything": EVERYTHING,
    "everything in two rows": replace(EVERYTHING, rows=2),
    "full": Case(queries=130, keys=300, spec=AttentionSpec(causal=False)),
    "window": Case(spec=AttentionSpec(window=50)),
    "window around": Case(spec=AttentionSpec(window=50, causal=False)),
    "keys later": Case(spec=AttentionSpec(kv_offset=100)),
    "keys all later": Case(spec=AttentionSpec(kv_offset=200)),
    "soft cap": Case(spec=AttentionSpec(logits_soft_cap=2.0)),
    "slopes": Case(slopes=True),
    "negative scale": Case(spec=AttentionSpec(logits_scale=-0.1)),
    "segments": Case(rows=2, segments=(70, 170)),
    "dropout": Case(queries=70, keys=140, spec=AttentionSpec(q_offset=64, kv_offset=16, dropout_rate=0.3)),
    "whole tiles": Case(queries=256, keys=384, heads=1, spec=AttentionSpec(q_offset=128)),
    "one": Case(queries=1, keys=1),
    "float16": Case(dtype="float16"),
    "96": Case(queries=130, head_dim=96, value_dim=96, heads=1),
    "128": Case(queries=300, keys=300, head_dim=128, value_dim=128, heads=4, kv_heads=2),
    "192": Case(queries=130, head_dim=192, value_dim=128, heads=1),
    "256": Case(queries=130, keys=130, head_dim=256, value_dim=256, heads=1),
    "40 and 24": Case(queries=130, keys=130, head_dim=40, value_dim=24, heads=1),
}
CASES = (
    FORWARD
    | {f"{name}, backward": replace(case, backward=True) for name, case in FORWARD.items()}
    | {f"{name}, deterministic": replace(case, backward=True, deterministic=True) for name, case in FORWARD.items()}
)


def inputs(case: Case) -> tuple[list[jax.Array], AttentionSpec]:
    """Queries, keys, values, the gradients of the output and of the log-sum-exp, and the spec with its arrays."""
    keys = jax.random.split(jax.random.key(0), 5)
    query, key = (case.rows, case.queries, case.heads), (case.rows, case.keys, case.kv_heads)
    shapes = [(*query, case.head_dim), (*key, case.head_dim), (*key, case.value_dim), (*query, case.value_dim)]
    arrays = [jax.random.normal(at, shape, case.dtype) for at, shape in zip(keys, shapes, strict=False)]
    arrays.append(jax.random.normal(keys[4], (case.rows, case.heads, case.queries)))
    spec = case.spec
    if case.segments:
        # the second row's documents end elsewhere
        ends = np.array(case.segments)[:, None] - 15 * np.arange(case.rows)
        numbers = [(np.arange(length)[None, None] >= ends[:, :, None]).sum(0) for length in (case.queries, case.keys)]
        spec = replace(spec, q_segment_ids=jnp.array(numbers[0]), kv_segment_ids=jnp.array(numbers[1]))
    if case.slopes:
        spec = replace(spec, alibi_slopes=2.0 ** -(1.0 + jnp.arange(case.heads)))
    if spec.dropout_rate:
        spec = replace(spec, dropout_seeds=jax.random.bits(keys[4], (case.rows, case.heads, 2), jnp.uint32))
    return arrays, spec


def attention(q: Any, k: Any, v: Any, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp in plain float32, by the definition of `AttentionSpec`."""
    k, v = (jnp.repeat(array, q.shape[2] // k.shape[2], axis=2) for array in (k, v))
    scores = jnp.einsum("bshd,bthd->bhst", q, k) * spec.scale(q.shape[3])
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * jnp.tanh(scores / spec.logits_soft_cap)
    distance = (spec.q_offset + np.arange(q.shape[1]))[:, None] - (spec.kv_offset + np.arange(k.shape[1]))[None]
    if spec.alibi_slopes is not None:
        scores = scores - spec.alibi_slopes[:, None, None] * distance
    counts = np.ones((1, *distance.shape), bool)
    if spec.causal:
        counts = counts & (distance >= 0)
    if spec.window is not None:
        counts = counts & (distance < spec.window) & (distance > -spec.window)
    if spec.q_segment_ids is not None:
        counts = counts & (spec.q_segment_ids[:, :, None] == spec.kv_segment_ids[:, None, :])
    counts = counts[:, None]
    highest = jnp.where(counts, scores, -1e30).max(-1, keepdims=True)
    weights = jnp.where(counts, jnp.exp(jnp.where(counts, scores - highest, 0.0)), 0.0)
    total = weights.sum(-1)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    kept = dropout.kept(spec, q.shape[1], k.shape[1])
    if kept is not None:
        weights = jnp.where(kept, weights * dropout_scale(spec.dropout_rate), 0.0)
    out = jnp.einsum("bhst,bthv->bshv", weights / safe[..., None], v)
    return out, jnp.where(seen, highest[..., 0] + jnp.log(safe), -jnp.inf)


def errors_of(case: Case) -> dict[str, float]:
    """Greatest error of each result, as a share of the greatest value (of the log-sum-exp: absolute)."""
    (q, k, v, dout, dlse), spec = inputs(case)
    exact = [array.astype(jnp.float32) for array in (q, k, v)]
    (out, lse), pull = jax.vjp(lambda q, k, v: attention(q, k, v, spec), *exact)
    if not case.backward:
        made, made_lse = mosaic.forward(q, k, v, spec, interpret=INTERPRETER)
        return {"out": error(made, out), "lse": distance_of(made_lse, lse)}
    wide = dout.astype(jnp.float32)
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0.0)
    delta = jnp.einsum("bshv,bshv->bhs", out, wide) - dlse
    spec = replace(spec, deterministic=case.deterministic)
    gradients = mosaic.backward(q, k, v, lse, delta, dout, spec, interpret=INTERPRETER)
    return {
        name: error(made, wanted)
        for name, made, wanted in zip(("dq", "dk", "dv"), gradients, pull((wide, dlse)), strict=True)
    }


def error(made: jax.Array, wanted: jax.Array) -> float:
    """Greatest error as a share of the greatest value; of an array of zeros the error itself."""
    greatest = float(jnp.abs(wanted).max())
    return float(jnp.abs(made.astype(jnp.float32) - wanted).max()) / (greatest or 1.0)


def distance_of(made: jax.Array, wanted: jax.Array) -> float:
    """Greatest error where both are finite; infinite where only one is."""
    same = np.isneginf(made) == np.isneginf(wanted)
    gaps = np.where(np.isneginf(wanted), 0.0, np.abs(np.asarray(made) - np.asarray(wanted)))
    return float(np.max(gaps)) if same.all() else float("inf")


RUNS = {name: functools.partial(errors_of, case) for name, case in CASES.items()}


class Races:
    """Whether each kernel that runs has a race, in their order; the interpreter remembers the last one's only."""

    def __init__(self) -> None:
        self._started: list[Any] = []
        self._make = gpu_callbacks.GPURaceDetectionState

    def __enter__(self) -> "Races":
        # what the run before left behind
        gpu_callbacks.reset_gpu_interpret_mode_state()

        def remember(**sizes: Any) -> Any:
            self._started.append(self._make(**sizes))
            return self._started[-1]

        gpu_callbacks.GPURaceDetectionState = remember
        return self

    def __exit__(self, *error: Any) -> None:
        gpu_callbacks.GPURaceDetectionState = self._make

    @property
    def found(self) -> list[bool]:
        return [bool(state.races_found) for state in self._started]


def main(names: list[str], runs: Mapping[str, Callable[[], Any]]) -> None:
    """One line per run: its errors, and of each of its kernels, in their order, whether it has a race."""
    for name in names:
        with Races() as races:
            errors = runs[name]()
        print(json.dumps({"case": name, "errors": errors, "races": races.found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:], RUNS)

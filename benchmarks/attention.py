"""`python -m benchmarks.attention`: our attention kernels beside cuDNN's and Tokamax's on the same cases, as JSON."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from benchmarks.side_by_side import Begins, Worker, agreement, compare, interleaved, recorded, serve, serves, timed
from jaxtron.kernels.attention import cudnn
from jaxtron.kernels.attention.attention import attention
from jaxtron.kernels.attention.backend import select_backend
from jaxtron.kernels.attention.spec import AttentionSpec

DIRECTIONS = ("forward", "backward")
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# of these the first is judged
OURS = ("mosaic", "mosaic_deterministic")
# relative norm of the difference that two implementations' roundings to bf16 can make, several times over: a result
# further from the others' is wrong, and its speed no figure
AGREEMENT = 0.02


@dataclass(frozen=True)
class Case:
    """Self-attention over `tokens` in sequences of `length`; targets are TFLOP/s on one H200."""

    length: int
    head_dim: int
    causal: bool = True
    heads: int = 16
    kv_heads: int = 16
    window: int | None = None
    documents: int = 1
    tokens: int = 16384
    forward_target: float | None = None
    backward_target: float | None = None

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.tokens // self.length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the documents in each sequence, cut at random places."""
        cuts = np.random.default_rng(0).choice(np.arange(1, self.length), self.documents - 1, replace=False)
        return tuple(int(size) for size in np.diff([0, *np.sort(cuts), self.length]))

    @property
    def flops(self) -> float:
        """Of the forward: two products for each pair that attends, of causal pairs half; the backward has five."""
        pairs = sum(self._pairs(length) for length in self.lengths)
        return 4.0 * self.rows * self.heads * self.head_dim * pairs

    def _pairs(self, length: int) -> float:
        if not self.causal:
            return length**2
        seen = min(length, self.window or length)
        return seen * length - seen**2 / 2

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of queries, keys, values and the output's cotangent: row, position, head, head dimension."""
        query, key = ((self.rows, self.length, heads, self.head_dim) for heads in (self.heads, self.kv_heads))
        return query, key, key, query

    def spec(self, *, deterministic: bool = False) -> AttentionSpec:
        """What is to be computed."""
        segments = None
        if self.documents > 1:
            row = np.repeat(np.arange(self.documents, dtype=np.int32), self.lengths)
            segments = jnp.broadcast_to(row, (self.rows, self.length))
        return AttentionSpec(
            causal=self.causal,
            window=self.window,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            deterministic=deterministic,
        )


CASES = (
    Case(4096, 128, forward_target=600),
    Case(8192, 128, backward_target=500),
    Case(16384, 128, forward_target=640),
    Case(16384, 128, causal=False, forward_target=690, backward_target=560),
    Case(16384, 64, heads=32, kv_heads=32, forward_target=500),
    Case(16384, 64, heads=32, kv_heads=32, causal=False, backward_target=470),
    Case(16384, 256, heads=8, kv_heads=8, forward_target=650, backward_target=350),
    Case(4096, 128, heads=32, kv_heads=8),
    Case(16384, 128, window=4096),
    Case(16384, 128, documents=8),
)


def ours(case: Case, device_kind: str, *, implementation: str = "mosaic", deterministic: bool = False) -> Attend:
    """One of `jaxtron.kernels.attention`, which raises for what it cannot do."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        spec = case.spec(deterministic=deterministic)
        backend = select_backend(implementation, q, k, v, spec, device_kind, needs_log_sum_exp=False)
        return attention(q, k, v, spec, backend.implementation)[0]

    return attend


def by_cudnn(case: Case, device_kind: str) -> Attend:
    """cuDNN's kernels under JAX's own rule, whose backward is given what its forward left; raises where they cannot."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        select_backend("cudnn", q, k, v, case.spec(), device_kind, needs_log_sum_exp=False)
        return cudnn.attend(q, k, v, case.spec())

    return attend


def tokamax(case: Case, device_kind: str) -> Attend:
    """Tokamax's Hopper kernels."""
    if case.documents > 1:
        raise NotImplementedError("its public function knows no documents")
    window = None if case.window is None else (case.window - 1, 0)
    function = importlib.import_module("tokamax").dot_product_attention
    return functools.partial(function, is_causal=case.causal, local_window_size=window, implementation="mosaic")


IMPLEMENTATIONS: dict[str, Callable[[Case, str], Attend]] = {
    "mosaic": ours,
    "mosaic_deterministic": functools.partial(ours, deterministic=True),
    "cudnn": by_cudnn,
    "tokamax": tokamax,
}


def main(argv: Sequence[str]) -> None:
    """Prints the result anew after every case, so that the last line is whole whenever it is stopped."""
    if serves(argv, __doc__):
        kind = jax.devices()[0].device_kind
        serve(
            Case,
            lambda case, names, begins: measure(case, {name: IMPLEMENTATIONS[name] for name in names}, kind, begins),
        )
        return
    missing = [name for name in ("tokamax",) if importlib.util.find_spec(name) is None]
    names = [name for name in IMPLEMENTATIONS if name not in missing]
    with Worker([sys.executable, "-m", "benchmarks.attention", "serve"], names) as worker:
        report(CASES, worker.measure, dict.fromkeys(missing, "not installed"))


def report(cases: Sequence[Case], run: Callable[[Case], Mapping[str, Any]], absent: Mapping[str, str]) -> dict:
    """Prints and returns every case with, of each implementation, what `run` measured or why there is nothing."""
    return side_by_side.report(cases, run, absent, judge)


def merged(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cases of several processes' reports, each with all implementations, judged anew."""
    return side_by_side.merged(Case, sections, judge)


def judge(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Whether our result agrees with another's, and for each direction our TFLOP/s against the others' and the target.

    None is what is not known: a wrong result has no speed.
    """
    found = entry["implementations"]
    ours, others = found.get(OURS[0], {}), {name: made for name, made in found.items() if name not in OURS}
    agrees = agreement(ours, AGREEMENT)
    judged: dict[str, Any] = {"agrees": agrees}
    for direction in DIRECTIONS:
        speed = None if agrees is False else _tflops(ours, direction)
        rivals = {name: _tflops(made, direction) for name, made in others.items()}
        judged[direction] = compare(speed, rivals, entry[f"{direction}_target"])
    return judged


def _tflops(made: Mapping[str, Any], direction: str) -> float | None:
    return made.get(direction, {}).get("tflops")


def measure(
    case: Case,
    implementations: Mapping[str, Callable[[Case, str], Attend]],
    kind: str,
    begins: Begins = lambda name: None,
) -> dict[str, Any]:
    """Times of each implementation in bf16 on random normal numbers, forward and backward alone.

    The implementations take turns, so that a clock that falls falls for all. Raises where the device is lost.
    """
    refused: dict[str, Any] = {}
    lowered = {}
    for name, make in implementations.items():
        begins(name)
        with recorded(name, refused):
            lowered[name] = lower(case, make(case, kind))
    begins("all compiled")
    keys = jax.random.split(jax.random.key(0), 4)
    numbers = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, case.shapes, strict=True)]
    calls: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in DIRECTIONS}
    made = {}
    # XLA compiles outside Python: at once for all
    with ThreadPoolExecutor() as pool:
        compiled = {name: pool.submit(lambda stages: [s.compile() for s in stages], s) for name, s in lowered.items()}
    for name, future in compiled.items():
        begins(name)
        with recorded(name, refused):
            forward, forward_kept, backward = future.result()
            out, kept = forward_kept(*numbers[:3])
            made[name] = jax.block_until_ready((out, *backward(kept, numbers[3])))
            calls["forward"][name] = functools.partial(forward, *numbers[:3])
            calls["backward"][name] = functools.partial(backward, kept, numbers[3])
        # after a fault in a kernel nothing runs in this process any more
        jax.block_until_ready(numbers[0] + 1)
    begins("all in turns")
    seconds = {direction: interleaved(calls[direction], jax.block_until_ready) for direction in DIRECTIONS}
    return refused | {name: figures(case, name, seconds) | differences(made, name) for name in made}


def lower(case: Case, attend: Attend, sharding: jax.sharding.Sharding | None = None) -> tuple[jax.stages.Lowered, ...]:
    """The forward, the forward that keeps what the backward needs, and the backward."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in case.shapes]
    structure = None

    def forward_kept(*heads: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        nonlocal structure
        out, pull = jax.vjp(attend, *heads)
        kept, structure = jax.tree.flatten(pull)
        return out, kept

    def backward(kept: list[jax.Array], cotangent: jax.Array) -> Any:
        return jax.tree.unflatten(structure, kept)(cotangent)

    forward, first = (jax.jit(function).lower(*arrays[:3]) for function in (attend, forward_kept))
    _, kept = jax.eval_shape(forward_kept, *arrays[:3])
    kept = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf in kept]
    return forward, first, jax.jit(backward).lower(kept, arrays[3])


def figures(case: Case, name: str, seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Of each direction median, fastest and slowest round, and TFLOP/s at the median."""
    flops = {"forward": case.flops, "backward": 2.5 * case.flops}
    return {direction: timed(seconds[direction][name], flops[direction]) for direction in DIRECTIONS}


@jax.jit
def _differences(made: Sequence[jax.Array], first: Sequence[jax.Array]) -> list[jax.Array]:
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(made, first, strict=True)]
    return [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in wide]


def differences(made: Mapping[str, Sequence[jax.Array]], name: str) -> dict[str, Any]:
    """How far output and gradients are from another's, relative to their norm: the first that is not ours, if any."""
    other = next((other for other in made if other != name and other not in OURS), None)
    if other is None:
        other = next((other for other in made if other != name), None)
    if other is None:
        return {}
    distances = map(float, _differences(made[name], made[other]))
    return {"differs_from": other, "differs": dict(zip(("out", "dq", "dk", "dv"), distances, strict=True))}


if __name__ == "__main__":
    main(sys.argv[1:])

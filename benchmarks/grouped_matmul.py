"""`python -m benchmarks.grouped_matmul`: our grouped products beside dense ones of the same FLOPs, as JSON."""

import functools
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
from jaxtron.kernels.grouped_matmul.backend import select_backend
from jaxtron.kernels.grouped_matmul.grouped_matmul import gradient, product, product_transposed
from jaxtron.kernels.grouped_matmul.spec import TILE

DIRECTIONS = ("product", "product_transposed", "gradient")
# of these the first is judged
OURS = ("mosaic", "xla")
# they have the same FLOPs and other numbers: what a grouped product could be at best
DENSE = ("dense", "torch_dense")
# relative norm of the difference that two implementations' roundings to bf16 can make, several times over: a result
# further from the others' is wrong, and its speed no figure
AGREEMENT = 0.02
# rows, cotangent and kernels -> the result of one direction
Multiply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Case:
    """Pairs of one device and its experts; targets are TFLOP/s on one H200."""

    pairs: int
    experts: int
    width: int
    out: int
    skew: float = 0.0
    """Standard deviation of the logarithm of an expert's popularity; above 0 one expert has no rows at all."""
    product_target: float | None = None
    product_transposed_target: float | None = None
    gradient_target: float | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each expert, of which no two are the same."""
        generator = np.random.default_rng(0)
        shares = np.exp(self.skew * generator.normal(size=self.experts))
        if self.skew:
            shares[self.experts // 2] = 0.0
        return tuple(int(count) for count in generator.multinomial(self.pairs, shares / shares.sum()))

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles of each expert."""
        return tuple(-(-count // TILE) for count in self.counts)

    @property
    def flops(self) -> float:
        """Of each direction: those of the rows, without what fills tiles."""
        return 2.0 * self.pairs * self.width * self.out

    @property
    def tile_experts(self) -> np.ndarray:
        """The expert of each tile."""
        return np.repeat(np.arange(self.experts, dtype=np.int32), self.tiles)

    @property
    def is_row(self) -> np.ndarray:
        """Of each row of the tiles, whether it is one."""
        parts = zip(self.counts, self.tiles, strict=True)
        return np.concatenate([np.arange(tiles * TILE) < count for count, tiles in parts])


_TARGETS = {"product_target": 680, "product_transposed_target": 680, "gradient_target": 700}
_FEW_ROWS = {"product_target": 600, "product_transposed_target": 600}
CASES = (
    # Mixtral 8x7B's up, Qwen3-30B's gate and up, with many rows of an expert and with 512
    Case(65536, 8, 4096, 14336, **_TARGETS),
    Case(262144, 128, 2048, 1536, **_TARGETS),
    Case(32768, 64, 2048, 1536, **_FEW_ROWS),
    # as routing is before it is balanced
    Case(65536, 32, 2048, 1536, skew=0.5, **_TARGETS),
    # one of 8 devices' share of DeepSeek-V3: 256 rows of an expert
    Case(8192, 32, 7168, 4096),
)


def ours(case: Case, kind: str, *, implementation: str = "mosaic") -> dict[str, Multiply]:
    """One of `jaxtron.kernels.grouped_matmul`; raises for what it cannot do."""
    rows, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (shapes(case)[0], shapes(case)[2]))
    chosen = select_backend(implementation, rows, kernel, kind).implementation
    experts = case.tile_experts
    return {
        "product": lambda rows, cotangent, kernel: product(rows, kernel, jnp.asarray(experts), chosen),
        "product_transposed": lambda rows, cotangent, kernel: product_transposed(
            cotangent, kernel, jnp.asarray(experts), chosen
        ),
        "gradient": lambda rows, cotangent, kernel: gradient(
            rows, cotangent, jnp.asarray(experts), case.experts, chosen
        ),
    }


def dense(case: Case, kind: str) -> dict[str, Multiply]:
    """All rows, as many as there are without what fills tiles, by one expert's kernel."""

    def part(rows: jax.Array) -> jax.Array:
        return rows[: case.pairs]

    def into(equation: str, dtype: Any = jnp.bfloat16) -> Callable[..., jax.Array]:
        return functools.partial(jnp.einsum, equation, preferred_element_type=dtype)

    return {
        "product": lambda rows, cotangent, kernel: into("ri,io->ro")(part(rows), kernel[0]),
        "product_transposed": lambda rows, cotangent, kernel: into("ro,io->ri")(part(cotangent), kernel[0]),
        "gradient": lambda rows, cotangent, kernel: into("ri,ro->io", jnp.float32)(part(rows), part(cotangent)),
    }


IMPLEMENTATIONS: dict[str, Callable[[Case, str], dict[str, Multiply]]] = {
    "mosaic": ours,
    "xla": functools.partial(ours, implementation="xla"),
    "dense": dense,
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
    with Worker([sys.executable, "-m", "benchmarks.grouped_matmul", "serve"], tuple(IMPLEMENTATIONS)) as worker:
        report(CASES, worker.measure)


def report(cases: Sequence[Case], run: Callable[[Case], Mapping[str, Any]]) -> dict[str, Any]:
    """Prints and returns every case with, of each implementation, what `run` measured or why there is nothing."""
    return side_by_side.report(cases, run, {}, judge)


def merged(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cases of several processes' reports, each with all implementations, judged anew."""
    return side_by_side.merged(Case, sections, judge)


def judge(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Whether our result agrees with plain JAX's, and for each direction our TFLOP/s against the fastest of others'
    grouped products, against the fastest dense one, and against the target.

    None is what is not known: a wrong result has no speed.
    """
    found = entry["implementations"]
    mine = found.get(OURS[0], {})
    agrees = agreement(mine, AGREEMENT)
    judged: dict[str, Any] = {"agrees": agrees}
    for direction in DIRECTIONS:
        speeds = {name: made.get(direction, {}).get("tflops") for name, made in found.items()}
        speed = None if agrees is False else speeds.get(OURS[0])
        rivals = {name: tflops for name, tflops in speeds.items() if name not in (*OURS, *DENSE)}
        best = max((tflops for name in DENSE if (tflops := speeds.get(name)) is not None), default=None)
        of_dense = None if speed is None or best is None else speed / best
        judged[direction] = {**compare(speed, rivals, entry[f"{direction}_target"]), "of_dense": of_dense}
    return judged


def measure(
    case: Case,
    implementations: Mapping[str, Callable[[Case, str], dict[str, Multiply]]],
    kind: str,
    begins: Begins = lambda name: None,
) -> dict[str, Any]:
    """Times of each implementation in bf16 on random normal numbers, each direction alone.

    The implementations take turns, so that a clock that falls falls for all. Raises where the device is lost.
    """
    refused: dict[str, Any] = {}
    lowered = {}
    for name, make in implementations.items():
        begins(name)
        with recorded(name, refused):
            lowered[name] = lower(case, make(case, kind))
    begins("all compiled")
    keys = jax.random.split(jax.random.key(0), 3)
    numbers = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes(case), strict=True)]
    is_row = jnp.asarray(case.is_row)[:, None]
    operands = [*(jnp.where(is_row, array, 0) for array in numbers[:2]), numbers[2]]
    # XLA compiles outside Python: at once for all
    with ThreadPoolExecutor() as pool:
        compiled = {
            name: pool.submit(lambda stages: {of: stage.compile() for of, stage in stages.items()}, stages)
            for name, stages in lowered.items()
        }
    calls: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in DIRECTIONS}
    made: dict[str, dict[str, jax.Array]] = {}
    for name, future in compiled.items():
        begins(name)
        with recorded(name, refused):
            programs = future.result()
            results = {direction: jax.block_until_ready(programs[direction](*operands)) for direction in DIRECTIONS}
            for direction in DIRECTIONS:
                calls[direction][name] = functools.partial(programs[direction], *operands)
            made[name] = results
        # after a fault in a kernel nothing runs in this process any more
        jax.block_until_ready(operands[0] + 1)
    different = {name: differences(made, name) for name in made}
    # results are gigabytes, which the timing needs
    names = list(made)
    made.clear()
    begins("all in turns")
    seconds = {direction: interleaved(calls[direction], jax.block_until_ready) for direction in DIRECTIONS}
    return refused | {name: figures(case, name, seconds) | different[name] for name in names}


def shapes(case: Case) -> tuple[tuple[int, ...], ...]:
    """Of rows, their cotangent, and kernels."""
    rows = sum(case.tiles) * TILE
    return (rows, case.width), (rows, case.out), (case.experts, case.width, case.out)


def lower(
    case: Case, functions: Mapping[str, Multiply], sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.stages.Lowered]:
    """The program of each direction."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes(case)]
    return {direction: jax.jit(function).lower(*arrays) for direction, function in functions.items()}


def figures(case: Case, name: str, seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Of each direction median, fastest and slowest round, and TFLOP/s at the median."""
    return {direction: timed(seconds[direction][name], case.flops) for direction in DIRECTIONS}


@jax.jit
def _distance(made: jax.Array, other: jax.Array) -> jax.Array:
    made, other = made.astype(jnp.float32), other.astype(jnp.float32)
    return jnp.linalg.norm(made - other) / jnp.linalg.norm(other)


def differences(made: Mapping[str, Mapping[str, jax.Array]], name: str) -> dict[str, Any]:
    """How far the results are from another grouped product's, relative to their norm, if there is one."""
    other = next((other for other in made if other != name and other not in DENSE), None)
    if name in DENSE or other is None:
        return {}
    distances = {of: float(_distance(made[name][of], made[other][of])) for of in DIRECTIONS}
    return {"differs_from": other, "differs": distances}


if __name__ == "__main__":
    main(sys.argv[1:])

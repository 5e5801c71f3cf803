"""`python -m benchmarks.ssd`: our state-space duality beside plain JAX's, as JSON; `bound`: the least that its compiled
programs can take, without a GPU."""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import side_by_side
from benchmarks.side_by_side import Begins, Worker, agreement, compare, interleaved, recorded, serve, timed
from jaxtron.kernels.ssd.backend import select_backend
from jaxtron.kernels.ssd.ssd import backward, forward
from jaxtron.plan.compiled import flops, hlo
from jaxtron.plan.compiled.deviceless import gpu_devices
from jaxtron.plan.machine import machine_named

DIRECTIONS = ("forward", "both")
"""Forward alone, and forward and backward."""
# of these the first is judged
OURS = ("mosaic", "xla")
# relative norm of the difference that two implementations' roundings to bf16 can make, several times over: a result
# further from the others' is wrong, and its speed no figure
AGREEMENT = 0.03
_RESULTS = ("y", "final", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial")
# what an entry computation holds beside what runs
_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
Arrays = Mapping[str, jax.Array]
# the arrays by name -> results by name
Scan = Callable[[Arrays], dict[str, jax.Array]]


@dataclass(frozen=True)
class Case:
    """Sizes of one device; targets are milliseconds on one H200."""

    rows: int
    length: int
    heads: int
    width: int
    groups: int
    size: int
    documents: int = 1
    """Of each row, all of one length."""
    forward_target: float | None = None
    both_target: float | None = None

    @property
    def flops(self) -> float:
        """Of the recurrence forward, position by position: a state's decay, sum and product with C."""
        return 5.0 * self.rows * self.length * self.heads * self.width * self.size

    def flops_of(self, direction: str) -> float:
        """The backward has twice the forward's."""
        return self.flops * (1 if direction == "forward" else 3)


CASES = (
    # the 8B Mamba-2 and hybrid with all heads of a layer, and a quarter of them on one row
    Case(8, 4096, 80, 64, 1, 128, forward_target=0.45, both_target=1.65),
    Case(8, 4096, 80, 64, 8, 128),
    Case(8, 4096, 80, 64, 1, 128, documents=8),
    Case(1, 32768, 32, 64, 2, 128),
    # Mamba-2 2.7B
    Case(8, 2048, 80, 64, 1, 64),
)


def main(argv: Sequence[str]) -> None:
    """Prints the result anew after every case, so that the last line is whole whenever it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    help_text = "bound: no times, but what compiled programs read, write and multiply; serve: cases on standard input"
    parser.add_argument("what", nargs="?", choices=["bound", "serve"], help=help_text)
    what = parser.parse_args(argv).what
    if what == "bound":
        for case in CASES:
            bounds = {gpu: bound(case, gpu) for gpu in ("h100", "h200")}
            print(json.dumps({**asdict(case), "bound": bounds}), flush=True)
    elif what == "serve":
        kind = jax.devices()[0].device_kind
        serve(
            Case,
            lambda case, names, begins: measure(case, {name: IMPLEMENTATIONS[name] for name in names}, kind, begins),
        )
    else:
        with Worker([sys.executable, "-m", "benchmarks.ssd", "serve"], tuple(IMPLEMENTATIONS)) as worker:
            report(CASES, worker.measure)


def report(cases: Sequence[Case], run: Callable[[Case], Mapping[str, Any]]) -> dict[str, Any]:
    """Prints and returns every case with, of each implementation, what `run` measured or why there is nothing."""
    return side_by_side.report(cases, run, {}, judge)


def merged(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cases of several processes' reports, each with all implementations, judged anew."""
    return side_by_side.merged(Case, sections, judge)


def judge(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Whether our results agree with plain JAX's, and for each direction our TFLOP/s against the fastest of others, and
    against the target's.

    None is what is not known: a wrong result has no speed.
    """
    found = entry["implementations"]
    case = Case(**{name: entry[name] for name in Case.__dataclass_fields__})
    agrees = agreement(found.get(OURS[0], {}), AGREEMENT)
    judged: dict[str, Any] = {"agrees": agrees}
    for direction in DIRECTIONS:
        speeds = {name: made.get(direction, {}).get("tflops") for name, made in found.items()}
        target = entry[f"{direction}_target"]
        wanted = None if target is None else 1e-9 * case.flops_of(direction) / target
        rivals = {name: speed for name, speed in speeds.items() if name not in OURS}
        judged[direction] = compare(None if agrees is False else speeds.get(OURS[0]), rivals, wanted)
    return judged


def ours(case: Case, kind: str, *, implementation: str = "mosaic") -> dict[str, Scan]:
    """One of `jaxtron.kernels.ssd`; raises for what it cannot do."""
    given = shapes(case)
    chosen = select_backend(implementation, given["x"], given["B"], kind).implementation

    def run_forward(arrays: Arrays) -> dict[str, jax.Array]:
        names = ("x", "dt", "A", "B", "C", "D", "initial")
        y, final, states = forward(*(arrays[name] for name in names), arrays.get("resets"), chosen)
        # as a training step keeps them
        return {"y": y, "final": final, "states": states}

    def run_both(arrays: Arrays) -> dict[str, jax.Array]:
        made = run_forward(arrays)
        names = ("x", "dt", "A", "B", "C", "D")
        given = (*(arrays[name] for name in names), made["states"], arrays["dy"], arrays["dfinal"])
        gradients = backward(*given, arrays.get("resets"), chosen)
        return dict(zip(_RESULTS, (made["y"], made["final"], *gradients), strict=True))

    return {"forward": run_forward, "both": run_both}


IMPLEMENTATIONS: dict[str, Callable[[Case, str], dict[str, Scan]]] = {
    "mosaic": ours,
    "xla": functools.partial(ours, implementation="xla"),
}


def measure(
    case: Case,
    implementations: Mapping[str, Callable[[Case, str], dict[str, Scan]]],
    kind: str,
    begins: Begins = lambda name: None,
) -> dict[str, Any]:
    """Times of each implementation in bf16, in turns, so that a clock that falls falls for all.

    Raises where the device is lost.
    """
    refused: dict[str, Any] = {}
    lowered = {}
    for name, make in implementations.items():
        begins(name)
        with recorded(name, refused):
            lowered[name] = lower(case, make(case, kind))
    begins("all compiled")
    operands = numbers(case)
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
            made[name] = jax.block_until_ready(programs["both"](operands))
            for direction in DIRECTIONS:
                calls[direction][name] = functools.partial(programs[direction], operands)
        # after a fault in a kernel nothing runs in this process any more
        jax.block_until_ready(operands["x"] + 1)
    different = {name: differences(made, name) for name in made}
    # results are gigabytes, which the timing needs
    names = list(made)
    made.clear()
    begins("all in turns")
    seconds = {direction: interleaved(calls[direction], jax.block_until_ready) for direction in DIRECTIONS}
    return refused | {name: figures(case, name, seconds) | different[name] for name in names}


def figures(case: Case, name: str, seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Of each direction median, fastest and slowest round, and TFLOP/s of the recurrence at the median."""
    return {direction: timed(seconds[direction][name], case.flops_of(direction)) for direction in DIRECTIONS}


def shapes(case: Case, sharding: jax.sharding.Sharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """What a case is computed from, by name."""

    def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    by_head = (case.rows, case.length, case.heads)
    x, keys = array(*by_head, case.width), array(case.rows, case.length, case.groups, case.size)
    state = array(case.rows, case.heads, case.size, case.width, dtype="float32")
    each = array(case.heads, dtype="float32")
    made = {"x": x, "dt": array(*by_head, dtype="float32"), "A": each, "B": keys, "C": keys, "D": each}
    made |= {"initial": state, "dy": x, "dfinal": state}
    if case.documents > 1:
        made["resets"] = array(case.rows, case.length, dtype="bool")
    return made


def numbers(case: Case) -> dict[str, jax.Array]:
    """Random normal ones, with steps and decays as Mamba-2 starts with."""
    given = shapes(case)
    keys = jax.random.split(jax.random.key(0), len(given))
    made = {}
    for key, (name, one) in zip(keys, given.items(), strict=True):
        if name == "resets":
            made[name] = jnp.tile(jnp.arange(case.length) % (case.length // case.documents) == 0, (case.rows, 1))
        elif name == "dt":
            made[name] = jnp.exp(jax.random.uniform(key, one.shape, minval=np.log(1e-3), maxval=np.log(1e-1)))
        elif name == "A":
            made[name] = -jax.random.uniform(key, one.shape, minval=1.0, maxval=16.0)
        else:
            scale = case.size**-0.5 if name in ("B", "C") else 1.0
            made[name] = scale * jax.random.normal(key, one.shape, one.dtype)
    return made


def lower(
    case: Case, functions: Mapping[str, Scan], sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.stages.Lowered]:
    """The program of each direction."""
    arrays = shapes(case, sharding)
    return {direction: jax.jit(function).lower(arrays) for direction, function in functions.items()}


def bound(case: Case, gpu: str) -> dict[str, dict[str, float]]:
    """Of each direction, compiled for a GPU that is not there: GB that its instructions read and write, TFLOP of its
    products, and milliseconds at the rates that a plan takes (`jaxtron/plan/machines.yaml`), the longer of both for
    each instruction."""
    machine = machine_named(gpu)
    bandwidth = machine.memory_fraction * machine.datasheet.memory_bandwidth
    rate = machine.product_fraction * machine.datasheet.peak_flops
    placed = NamedSharding(Mesh(np.array(gpu_devices(gpu, 1)), ("x",)), PartitionSpec())
    found = {}
    for direction, stage in lower(case, ours(case, machine.datasheet.device_kind), placed).items():
        module = hlo.parse(str(stage.compile().as_text()))
        moved, multiplied, seconds = 0, 0, 0.0
        for size, products in _instructions(module):
            moved, multiplied = moved + size, multiplied + products
            seconds += max(size / bandwidth, products / rate)
        found[direction] = {
            "gigabytes": 1e-9 * moved,
            "teraflops": 1e-12 * multiplied,
            "milliseconds": 1e3 * seconds,
        }
    return found


def _instructions(module: hlo.Module) -> list[tuple[int, int]]:
    """Bytes and FLOPs of each instruction of the program that runs something."""
    program = module.computations[module.entry]
    shapes = {instruction.name: instruction.results for instruction in program}
    made, known = [], {}
    for instruction in program:
        if instruction.operation in _NOTHING or instruction.is_end:
            continue
        read = {name for name in re.findall(r"%([\w.\-]+)", instruction.arguments)}
        arrays = [*instruction.results, *(array for name in read for array in shapes.get(name, ()))]
        products = flops.most(module, instruction, shapes, known)
        made.append((sum(array.bytes for array in arrays), products))
    return made


@jax.jit
def _distance(made: jax.Array, other: jax.Array) -> jax.Array:
    made, other = made.astype(jnp.float32), other.astype(jnp.float32)
    # zeros are no distance from zeros: nothing is asked of a state before a document's first position
    return jnp.linalg.norm(made - other) / jnp.maximum(jnp.linalg.norm(other), jnp.finfo(jnp.float32).tiny)


def differences(made: Mapping[str, Mapping[str, jax.Array]], name: str) -> dict[str, Any]:
    """How far results are from another implementation's, relative to their norm, if there is one."""
    other = next((other for other in made if other != name), None)
    if other is None:
        return {}
    return {
        "differs_from": other,
        "differs": {of: float(_distance(made[name][of], made[other][of])) for of in _RESULTS},
    }


if __name__ == "__main__":
    main(sys.argv[1:])

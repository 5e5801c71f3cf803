"""Runs a Mosaic kernel in Pallas' interpreter, then with each fault of `faults.py`, a line of JSON each: what was seen.

`python tests/kernels/planted.py KERNEL [FAULT ...]`, a process of its own like `interpreted.py`.
"""

import functools
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import interpreted
import interpreted_blocks
import jax
import jax.numpy as jnp
from faults import FAULTS, Fault
from interpreted import INTERPRETER, Races
from interpreted_ssd import PLAIN
from test_ssd import given

from jaxtron.kernels.attention import mosaic_backward, mosaic_forward, mosaic_queries
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.block_products import mosaic as block
from jaxtron.kernels.grouped_matmul import mosaic as grouped
from jaxtron.kernels.mosaic import Target
from jaxtron.kernels.ssd import mosaic_forward as ssd_forward
from jaxtron.kernels.ssd.mosaic_decays import Decays
from jaxtron.kernels.ssd.mosaic_inputs import by_inputs
from jaxtron.kernels.ssd.mosaic_march import march
from jaxtron.kernels.ssd.mosaic_outputs import by_outputs

TARGET = Target(INTERPRETER)


def attention(kernel: str) -> Any:
    """One block of a kernel with dropout, that fills its stages anew."""
    queries, keys = {"forward": (128, 384), "backward": (192, 128), "queries": (128, 192)}[kernel]
    spec = AttentionSpec(q_offset=384, dropout_rate=0.25)
    (q, k, v, dout, lse), spec = interpreted.inputs(
        interpreted.Case(queries=queries, keys=keys, heads=1, kv_heads=1, spec=spec)
    )
    scale = spec.scale(q.shape[3])
    if kernel == "forward":
        return mosaic_forward.forward(q, k, v, spec, keys, queries, scale, TARGET)
    given = (q, k, v, dout, lse, lse, spec, (queries, keys), scale)
    if kernel == "queries":
        return mosaic_queries.backward(*given, TARGET)
    return mosaic_backward.backward(*given, mosaic_backward.Wanted(dq=True, dk=True, dv=True), TARGET)


def grouped_products() -> Any:
    """A block that takes two tiles, each of more steps than it has stages, and stores them in three pieces each."""
    rows, kernel = jnp.ones((256, 320), jnp.bfloat16), jnp.ones((2, 320, 192), jnp.bfloat16)
    experts = jnp.arange(2, dtype=jnp.int32)
    return grouped.product(rows, kernel, experts, interpret=INTERPRETER, blocks=1)


def block_products() -> Any:
    """A block that takes a tile of more steps than it has stages, whose scales are read by ordinary loads."""
    return block.product(*interpreted_blocks.operands("blocks"), jnp.bfloat16, interpret=INTERPRETER, blocks=1)


def duality(kernel: str) -> Any:
    """A block that walks along three chunks, or adds up three heads in one chunk."""
    along = kernel in ("forward", "march")
    # states of 64 rows are one warpgroup's: the other one has its own fence alone
    size = 64 if kernel == "march" else 128
    case = replace(PLAIN, length=384 if along else 128, heads=1 if along else 3, size=size)
    arrays = {name: None if array is None else jnp.asarray(array) for name, array in given(case).arrays.items()}
    x, dy, initial = arrays["x"], arrays["dy"], arrays["initial"]
    dt, A, B, C, D = (arrays[name] for name in ("dt", "A", "B", "C", "D"))
    decays, chunks = Decays.of(dt, A, None), case.length // 128
    if kernel == "forward":
        return ssd_forward.forward(x, B, C, D, initial, decays, TARGET)
    states = jnp.zeros((1, chunks, *initial.shape[1:]), x.dtype)
    if kernel == "march":
        return march(x, B, decays.to_end, decays.through, initial, TARGET, reverse=False, others=states)
    scores = jnp.zeros((1, chunks, 1, 128, 128), x.dtype)
    if kernel == "inputs":
        return by_inputs(x, dy, B, C, D, states, scores, decays, 1, TARGET)
    return by_outputs(x, dy, B, C, states, scores, decays, 1, TARGET)


KERNELS: dict[str, Callable[[], Any]] = {
    "attention forward": functools.partial(attention, "forward"),
    "attention backward": functools.partial(attention, "backward"),
    "attention backward, queries": functools.partial(attention, "queries"),
    "grouped products": grouped_products,
    "products of blocks": block_products,
    "state-space duality forward": functools.partial(duality, "forward"),
    "state-space duality from chunk to chunk": functools.partial(duality, "march"),
    "state-space duality by inputs": functools.partial(duality, "inputs"),
    "state-space duality by outputs": functools.partial(duality, "outputs"),
}


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The function with the fault, wherever it is called."""
    module, _, path = fault.function.partition(":")
    function: Any = functools.reduce(getattr, path.split("."), importlib.import_module(f"jaxtron.kernels.{module}"))
    text, right = textwrap.dedent(inspect.getsource(function)), function.__code__
    assert text.count(fault.old) == 1, f"{fault.function} has this {text.count(fault.old)} times: {fault.old}"
    names = dict(function.__globals__)
    exec(compile(text.replace(fault.old, fault.new), f"<{fault.function}>", "exec"), names)
    function.__code__ = names[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = right


def seen(run: Callable[[], Any]) -> str:
    """What shows that a kernel is wrong: a race, an error; or nothing."""
    races, error = Races(), None
    with races:
        try:
            jax.block_until_ready(run())
        except jax.errors.JaxRuntimeError as raised:
            error = raised
    return "race" if any(races.found) else "error" if error else "nothing"


def main(kernel: str, names: list[str]) -> None:
    """The kernel as it is, then with these faults; none named: with each."""
    run, faults = KERNELS[kernel], FAULTS[kernel]
    print(json.dumps({"fault": None, "seen": seen(run)}), flush=True)
    for name in names or faults:
        with planted(faults[name]):
            print(json.dumps({"fault": name, "seen": seen(run)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""`python -m benchmarks.grouped_matmul_torch`: PyTorch's grouped and dense products on the same cases, as JSON.

Absent without PyTorch.
"""

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.grouped_matmul import CASES, DIRECTIONS, Case, figures, report
from benchmarks.side_by_side import Begins, Worker, interleaved, recorded, serve, serves

# rows of an expert are padded to it: 16 bytes, below which its kernels refuse the gradient
_ALIGNED = 8


def main(argv: Sequence[str]) -> None:
    """Prints every case with PyTorch's grouped and dense products, or that there is no PyTorch."""
    if importlib.util.find_spec("torch") is None:
        print(json.dumps({"absent": "PyTorch is not installed"}))
    elif serves(argv, __doc__):
        torch = importlib.import_module("torch")
        serve(Case, lambda case, names, begins: measure(case, {name: PRODUCTS[name] for name in names}, torch, begins))
    else:
        with Worker([sys.executable, "-m", "benchmarks.grouped_matmul_torch", "serve"], tuple(PRODUCTS)) as worker:
            report(CASES, worker.measure)


def grouped(case: Case, torch: Any, device: str) -> dict[str, Callable[[], Any]]:
    """`torch.nn.functional.grouped_mm`, rows of each expert one after the other."""
    counts = [-(-count // _ALIGNED) * _ALIGNED for count in case.counts]
    rows, cotangent, kernel = _operands(torch, device, sum(counts), case, case.experts)
    ends = torch.tensor(np.cumsum(counts).tolist(), device=device, dtype=torch.int32)
    multiply = torch.nn.functional.grouped_mm
    return {
        "product": functools.partial(multiply, rows, kernel, offs=ends),
        "product_transposed": functools.partial(multiply, cotangent, kernel.transpose(-2, -1), offs=ends),
        "gradient": functools.partial(multiply, rows.transpose(-2, -1), cotangent, offs=ends),
    }


def dense(case: Case, torch: Any, device: str) -> dict[str, Callable[[], Any]]:
    """All rows by one kernel."""
    rows, cotangent, kernel = _operands(torch, device, case.pairs, case, 1)
    return {
        "product": functools.partial(torch.matmul, rows, kernel[0]),
        "product_transposed": functools.partial(torch.matmul, cotangent, kernel[0].transpose(-2, -1)),
        "gradient": functools.partial(torch.matmul, rows.transpose(-2, -1), cotangent),
    }


PRODUCTS: dict[str, Callable[[Case, Any, str], dict[str, Callable[[], Any]]]] = {
    "torch_grouped": grouped,
    "torch_dense": dense,
}


def measure(
    case: Case,
    products: Mapping[str, Callable[[Case, Any, str], dict[str, Callable[[], Any]]]],
    torch: Any,
    begins: Begins = lambda name: None,
) -> dict[str, Any]:
    """As `benchmarks.grouped_matmul.measure`: bf16, products in turns; its gradients are bf16 too."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    refused: dict[str, Any] = {}
    calls: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in DIRECTIONS}
    for name, make in products.items():
        begins(name)
        with recorded(name, refused):
            made = make(case, torch, "cuda" if on_gpu else "cpu")
            for call in made.values():
                wait(call())
            for direction in DIRECTIONS:
                calls[direction][name] = made[direction]
        # after a fault in a kernel nothing runs in this process any more
        wait(None)
    begins("all in turns")
    seconds = {direction: interleaved(calls[direction], wait) for direction in DIRECTIONS}
    return refused | {name: figures(case, name, seconds) for name in calls["product"]}


def _operands(torch: Any, device: str, rows: int, case: Case, kernels: int) -> list[Any]:
    shapes = ((rows, case.width), (rows, case.out), (kernels, case.width, case.out))
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


if __name__ == "__main__":
    main(sys.argv[1:])

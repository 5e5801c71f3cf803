"""`python -m benchmarks.ssd_torch`: the Triton kernels of state-spaces' mamba_ssm on the same cases, as JSON.

Absent without PyTorch and mamba_ssm.
"""

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.side_by_side import Begins, Worker, interleaved, recorded, serve, serves
from benchmarks.ssd import CASES, DIRECTIONS, Case, figures, report

# of its kernels, as its models call them
_CHUNK = 256


def main(argv: Sequence[str]) -> None:
    """Prints every case with state-spaces' kernels, or that they are not there."""
    missing = [name for name in ("torch", "mamba_ssm") if importlib.util.find_spec(name) is None]
    if missing:
        print(json.dumps({"absent": f"{' and '.join(missing)} cannot be imported"}))
    elif serves(argv, __doc__):
        torch = importlib.import_module("torch")
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        serve(Case, lambda case, names, begins: measure(case, dict.fromkeys(names, combined), torch, begins))
    else:
        with Worker([sys.executable, "-m", "benchmarks.ssd_torch", "serve"], ("state_spaces",)) as worker:
            report(CASES, worker.measure)


def measure(
    case: Case, scans: Mapping[str, Callable[..., Any]], torch: Any, begins: Begins = lambda name: None
) -> dict[str, Any]:
    """As `benchmarks.ssd.measure`: bf16, forward alone, then forward and backward."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    refused: dict[str, Any] = {}
    calls: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in DIRECTIONS}
    for name, scan in scans.items():
        begins(name)
        with recorded(name, refused):
            made = directions(case, scan, torch, "cuda" if on_gpu else "cpu")
            for call in made.values():
                wait(call())
            for direction in DIRECTIONS:
                calls[direction][name] = made[direction]
        # after a fault in a kernel nothing runs in this process any more
        wait(None)
    begins("all in turns")
    seconds = {direction: interleaved(calls[direction], wait) for direction in DIRECTIONS}
    return refused | {name: figures(case, name, seconds) for name in calls["forward"]}


def directions(case: Case, scan: Callable[..., Any], torch: Any, device: str) -> dict[str, Callable[[], Any]]:
    """Calls of `mamba_chunk_scan_combined` as a training step makes them: from a state and to a state."""

    def normal(*shape: int, dtype: Any = torch.bfloat16, scale: float = 1.0) -> Any:
        return (scale * torch.randn(shape, device=device, dtype=dtype)).requires_grad_()

    by_head, keys = (case.rows, case.length, case.heads), (case.rows, case.length, case.groups, case.size)
    state = (case.rows, case.heads, case.width, case.size)
    x, B, C = normal(*by_head, case.width), normal(*keys, scale=case.size**-0.5), normal(*keys, scale=case.size**-0.5)
    dt = (1e-3 + 0.1 * torch.rand(by_head, device=device, dtype=torch.float32)).requires_grad_()
    A = (-1.0 - 15.0 * torch.rand((case.heads,), device=device, dtype=torch.float32)).requires_grad_()
    D, initial = normal(case.heads, dtype=torch.float32), normal(*state, dtype=torch.float32)
    dy, dfinal = torch.ones_like(x), torch.ones_like(initial)
    documents = {}
    if case.documents > 1:
        number = torch.arange(case.length, device=device, dtype=torch.int32) // (case.length // case.documents)
        documents = {"seq_idx": number.repeat(case.rows, 1)}
    given = {"chunk_size": _CHUNK, "D": D, "initial_states": initial, "return_final_states": True, **documents}
    run = functools.partial(scan, x, dt, A, B, C, **given)

    def both() -> Any:
        y, final = run()
        return torch.autograd.grad((y, final), (x, dt, A, B, C, D, initial), (dy, dfinal))

    return {"forward": run, "both": both}


if __name__ == "__main__":
    main(sys.argv[1:])

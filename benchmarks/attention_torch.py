"""`python -m benchmarks.attention_torch`: PyTorch's attention on the same cases, as JSON; absent without PyTorch."""

import functools
import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.attention import CASES, DIRECTIONS, Case, figures, report
from benchmarks.side_by_side import Begins, Worker, interleaved, recorded, serve, serves

BACKENDS = {"torch_flash": "FLASH_ATTENTION", "torch_cudnn": "CUDNN_ATTENTION"}


def main(argv: Sequence[str]) -> None:
    """Prints every case with PyTorch's flash and cuDNN backends, or that there is no PyTorch."""
    if importlib.util.find_spec("torch") is None:
        print(json.dumps({"absent": "PyTorch is not installed"}))
    elif serves(argv, __doc__):
        torch = importlib.import_module("torch")
        serve(Case, lambda case, names, begins: measure(case, {name: BACKENDS[name] for name in names}, torch, begins))
    else:
        with Worker([sys.executable, "-m", "benchmarks.attention_torch", "serve"], tuple(BACKENDS)) as worker:
            report(CASES, worker.measure, {})


def measure(case: Case, backends: Mapping[str, str], torch: Any, begins: Begins = lambda name: None) -> dict[str, Any]:
    """As `benchmarks.attention.measure`: bf16, heads behind positions in memory, backends in turns."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    parts = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in case.shapes]
    heads, cotangent = [part.requires_grad_() for part in parts[:3]], parts[3]
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    refused: dict[str, Any] = {}
    calls: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in DIRECTIONS}
    for name, backend in backends.items():
        begins(name)
        with recorded(name, refused):
            attend = attention(case, torch, backend, heads)
            out = attend()
            backward = functools.partial(torch.autograd.grad, out, heads, cotangent, retain_graph=True)
            wait(backward())
            calls["forward"][name], calls["backward"][name] = attend, backward
        # after a fault in a kernel nothing runs in this process any more
        wait(None)
    begins("all in turns")
    seconds = {direction: interleaved(calls[direction], wait) for direction in DIRECTIONS}
    return refused | {name: figures(case, name, seconds) for name in calls["forward"]}


def attention(case: Case, torch: Any, backend: str, heads: Sequence[Any]) -> Callable[[], Any]:
    """A call of one backend, with output as [row, position, head, head dimension]."""
    if case.window is not None or case.documents > 1:
        if backend != "FLASH_ATTENTION":
            raise NotImplementedError("neither windows nor documents")
        return _packed(case, torch, heads)
    kernels = importlib.import_module("torch.nn.attention")
    query, key, value = (part.transpose(1, 2) for part in heads)
    chosen = getattr(kernels.SDPBackend, backend)

    def attend() -> Any:
        with kernels.sdpa_kernel(chosen):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads
            )
        return out.transpose(1, 2)

    return attend


def _packed(case: Case, torch: Any, heads: Sequence[Any]) -> Callable[[], Any]:
    """Its kernels for documents of many lengths, which also know windows."""
    kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    ends = list(itertools.accumulate(case.lengths * case.rows, initial=0))
    ends = torch.tensor(ends, device=heads[0].device, dtype=torch.int32)
    longest = max(case.lengths)
    # keys before the query and after it; -1: all
    window = (-1 if case.window is None else case.window - 1, 0)
    flat = [part.flatten(0, 1) for part in heads]

    def attend() -> Any:
        out = kernel(*flat, ends, ends, longest, longest, window_size=window)
        return out.view(heads[0].shape)

    return attend


if __name__ == "__main__":
    main(sys.argv[1:])

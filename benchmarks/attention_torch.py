"""`python -m benchmarks.attention_torch`: PyTorch's attention on the same cases, as JSON; absent without PyTorch."""

import importlib.util
import json
import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.attention import Case, report

ROUNDS = 20


def main() -> None:
    """Prints every case with PyTorch's flash and cuDNN backends, or that there is no PyTorch."""
    if importlib.util.find_spec("torch") is None:
        print(json.dumps({"absent": "PyTorch is not installed"}))
        return
    backends = {"torch_flash": "FLASH_ATTENTION", "torch_cudnn": "CUDNN_ATTENTION"}
    print(json.dumps(report({name: partial(measure, backend=backend) for name, backend in backends.items()}), indent=1))


def measure(case: Case, backend: str) -> tuple[float, float]:
    """Seconds of the forward, and of the backward alone, in bf16 on random normal numbers."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows, length, heads, head_dim = case.shape
    shape = (rows, heads, length, head_dim)
    parts = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        attend = partial(torch.nn.functional.scaled_dot_product_attention, *parts, is_causal=case.causal)
        forward = _cuda_seconds(torch, attend)
        mixed = attend()
        backward = partial(torch.autograd.grad, mixed, parts, cotangent, retain_graph=True)
        return forward, _cuda_seconds(torch, backward)


def _cuda_seconds(torch, function: Callable[[], object]) -> float:
    """Median seconds of a call between events of the device."""
    for _ in range(3):
        function()
    seconds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        seconds.append(1e-3 * start.elapsed_time(end))
    return statistics.median(seconds)


if __name__ == "__main__":
    main()

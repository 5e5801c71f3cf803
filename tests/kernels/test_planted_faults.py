"""The interpreter finds what a Mosaic kernel lacks: a wait, a fence, a meeting of its warpgroups, a second place."""

import ast
import re
import textwrap
from pathlib import Path

import jax
import pytest
from faults import FAULTS
from test_mosaic_interpreted import run

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter before JAX 0.11 lacks layouts and transposed operands"
)
PROGRAM = Path(__file__).with_name("planted.py")
KERNELS = Path(__file__).parents[2] / "jaxtron" / "kernels"
SYNCHRONIZES = re.compile(r"plgpu\.(barrier_wait|commit_smem|wait_smem_to_gmem|wgmma_wait)\b")
# the meetings themselves, whose calls are left out; last arrivals that are seen, as in the other kernels; the turns of
# the forward, which no result depends on; and a wait for additions to dq that the last wait repeats
UNPLANTED = {
    "attention.mosaic_backward:_compute": 1,
    "attention.mosaic_backward:_copy_queries": 2,
    "attention.mosaic_backward:_meet": 1,
    "attention.mosaic_forward:_compute": 1,
    "attention.mosaic_forward:copy_keys": 1,
    "ssd.mosaic_chunks:meet": 1,
}


def check(kernel: str, *names: str) -> None:
    """Nothing is seen of the kernel as it is, and each fault by what the table says."""
    wanted = {None: "nothing", **{name: FAULTS[kernel][name].seen for name in names}}
    reports = run(PROGRAM, [kernel, *names], seconds=300)
    assert {report["fault"]: report["seen"] for report in reports} == wanted


@interpreted
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [("attention backward", "no fence before the meeting"), ("grouped products", "two products under way")],
    ids=["fence", "wait"],
)
def test_what_tensor_cores_still_read_or_do_not_see_yet_is_found(kernel: str, fault: str) -> None:
    check(kernel, fault)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kernel", FAULTS)
def test_every_fault_is_found(kernel: str) -> None:
    check(kernel, *FAULTS[kernel])


def functions(module: Path) -> dict[str, str]:
    """The text of each function and method, as `Fault.function` names them."""
    lines = module.read_text().splitlines(keepends=True)
    body = ast.parse("".join(lines)).body
    named = [("", node) for node in body]
    named += [(f"{node.name}.", inner) for node in body if isinstance(node, ast.ClassDef) for inner in node.body]
    return {
        f"{module.parent.name}.{module.stem}:{prefix}{node.name}": textwrap.dedent(
            "".join(lines[node.lineno - 1 : node.end_lineno])
        )
        for prefix, node in named
        if isinstance(node, ast.FunctionDef)
    }


def test_every_wait_and_fence_is_left_out_once() -> None:
    faults = [fault for kernel in FAULTS.values() for fault in kernel.values()]
    left = {}
    for module in sorted(KERNELS.glob("*/mosaic*.py")):
        for name, text in functions(module).items():
            changed = [fault.old for fault in faults if fault.function == name]
            spans = [range(text.index(old), text.index(old) + len(old)) for old in changed]
            count = sum(not any(match.start() in span for span in spans) for match in SYNCHRONIZES.finditer(text))
            if count:
                left[name] = count
    assert left == UNPLANTED

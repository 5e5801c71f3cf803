"""The benchmark of state-space duality: what it measures, how it judges, and the least time of what it compiles."""

import functools
import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from tests.support.scan_bounds import BOUNDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/, which is not installed with the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_both_directions_are_measured_and_what_refuses_has_no_number(benchmark, monkeypatch, capfd) -> None:
    module = benchmark("ssd")
    monkeypatch.setattr(module, "interleaved", functools.partial(module.interleaved, rounds=2, round_seconds=0.001))
    case = module.Case(1, 16, 2, 8, 1, 8, documents=2)
    plain = {name: functools.partial(module.ours, implementation=name) for name in ("reference", "xla")}
    (entry,) = module.report([case], lambda case: module.measure(case, {"mosaic": module.ours, **plain}, "cpu"))[
        "cases"
    ]
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cases"] == [entry]
    made = entry["implementations"]
    assert "Hopper" in made["mosaic"]["error"] and "forward" not in made["mosaic"]
    for direction, times in (("forward", 1), ("both", 3)):
        found = made["xla"][direction]
        assert 0 < found["milliseconds"]["min"] <= found["milliseconds"]["median"] <= found["milliseconds"]["max"]
        assert found["tflops"] * found["milliseconds"]["median"] * 1e9 == pytest.approx(times * entry["flops"])
    assert made["xla"]["differs_from"] == "reference"
    assert all(distance < module.AGREEMENT for distance in made["xla"]["differs"].values())
    assert entry["judged"]["forward"]["tflops"] is None and entry["judged"]["agrees"] is None


def test_times_are_judged_by_others_and_by_targets(benchmark) -> None:
    module = benchmark("ssd")
    case = module.CASES[0]

    def made(forward: float, both: float, distance: float = 0.004) -> dict:
        seconds = {"forward": [1e-3 * forward], "both": [1e-3 * both]}
        named = {direction: {"one": times} for direction, times in seconds.items()}
        return {**module.figures(case, "one", named), "differs": {"y": distance}}

    def judge(mosaic: dict) -> dict:
        found = {"mosaic": mosaic, "xla": made(0.1, 0.2), "state_spaces": made(0.8, 3.0)}
        return module.judge({**asdict(case), "implementations": found})

    judged = judge(made(0.4, 1.8))
    assert judged["agrees"] and judged["forward"]["ratio"] == pytest.approx(2.0)
    assert judged["forward"]["target_met"] and not judged["both"]["target_met"]
    assert judged["both"]["best_of_others"] == "state_spaces"
    for wrong in ({"error": "no"}, made(0.1, 0.2, 0.5), made(0.1, 0.2, float("nan"))):
        assert judge(wrong)["forward"]["ratio"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "groups", "forward", "both"), BOUNDS)
def test_the_compiled_bound_leaves_room_for_the_targets(benchmark, gpu, groups, forward, both) -> None:
    """Bytes are those of what goes in and out of each kernel, FLOPs those of their products; milliseconds are those
    that plans are held to."""
    module = benchmark("ssd")
    (case,) = (case for case in module.CASES[:2] if case.groups == groups)
    found = module.bound(case, gpu)
    assert found["forward"]["milliseconds"] == pytest.approx(forward, abs=0.006)
    assert found["both"]["milliseconds"] == pytest.approx(both, abs=0.006)
    x = 1e-9 * case.rows * case.length * case.heads * case.width * 2
    # x, y and the states, each once; then x and dy twice, the states and their gradients, dx
    assert 3 * x < found["forward"]["gigabytes"] < 4 * x
    # B, C, their gradients and scores of a group each
    assert 12 * x < found["both"]["gigabytes"] < (15.5 if groups == 1 else 19) * x
    if gpu == "h200" and case.forward_target is not None:
        assert (
            found["forward"]["milliseconds"] < case.forward_target and found["both"]["milliseconds"] < case.both_target
        )


def test_state_spaces_kernels_are_called_as_they_are_declared(benchmark, monkeypatch) -> None:
    """By the signature of mamba_ssm 2.2: tests have no PyTorch."""
    module, cases = benchmark("ssd_torch"), benchmark("ssd").CASES
    monkeypatch.setattr(module, "interleaved", functools.partial(module.interleaved, rounds=1, round_seconds=0.0))
    calls, torch = [], MagicMock()
    torch.cuda.is_available.return_value = False

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
        dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
    ):  # fmt: skip
        calls.append((chunk_size, seq_idx is not None, return_final_states))
        return x, initial_states

    for case, packed in ((cases[0], False), (replace(cases[0], documents=8), True)):
        made = module.measure(case, {"state_spaces": mamba_chunk_scan_combined}, torch)
        assert set(made["state_spaces"]) == {"forward", "both"} and calls[-1] == (256, packed, True)


def test_a_table_of_state_space_duality(benchmark) -> None:
    module, table = benchmark("ssd"), benchmark("table")
    case = module.CASES[0]
    ours = module.figures(case, "one", {"forward": {"one": [4e-4]}, "both": {"one": [1.5e-3]}})
    theirs = module.figures(case, "one", {"forward": {"one": [8e-4]}, "both": {"one": [3e-3]}})
    sections = {
        "ssd_jax": {"result": {"cases": [{**asdict(case), "implementations": {"mosaic": ours}}]}},
        "ssd_torch": {"result": {"cases": [{**asdict(case), "implementations": {"state_spaces": theirs}}]}},
    }
    text = table.ssd_tables([{"date": "2026-01-02", "device": "NVIDIA H200", "sections": sections}])
    row = "| 8 x 4,096 | 80 of 64 | 1 | 128 | 1 | 0.400 / 1.500 | 0.800 / 3.000 | 2.00 / 2.00 |"
    assert row in text
    assert table.ssd_tables([{"date": "2026-01-02", "device": "NVIDIA H200", "sections": {}}]) == ""

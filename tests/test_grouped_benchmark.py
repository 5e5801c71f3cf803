"""The benchmark of grouped products: what it measures, how it judges, and that its cases compile for a GPU."""

import functools
import importlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtron.plan.compiled.deviceless import gpu_devices

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/, which is not installed with the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_products_are_measured_and_what_refuses_has_no_number(benchmark, monkeypatch, capfd) -> None:
    module = benchmark("grouped_matmul")
    quick = functools.partial(module.interleaved, rounds=2, round_seconds=0.001)
    monkeypatch.setattr(module, "interleaved", quick)
    case = module.Case(500, 4, 32, 48, skew=0.5)
    assert sum(case.counts) == 500 and case.counts[2] == 0 and case.is_row.sum() == 500
    assert len(case.tile_experts) * 128 == len(case.is_row) == module.shapes(case)[0][0]
    plain = {name: functools.partial(module.ours, implementation=name) for name in ("reference", "xla")}

    def measure(case):
        return module.measure(case, {"mosaic": module.ours, **plain, "dense": module.dense}, "cpu")

    (entry,) = module.report([case], measure)["cases"]
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cases"] == [entry]
    made = entry["implementations"]
    assert "Hopper" in made["mosaic"]["error"] and "product" not in made["mosaic"]
    assert entry["flops"] == 2 * 500 * 32 * 48
    for direction in module.DIRECTIONS:
        for name in ("xla", "dense"):
            times = made[name][direction]["milliseconds"]
            assert 0 < times["min"] <= times["median"] <= times["max"]
            assert made[name][direction]["tflops"] * times["median"] * 1e9 == pytest.approx(entry["flops"])
    # the dense one has other numbers: it is compared with nobody, and nobody with it
    assert made["xla"]["differs_from"] == "reference" and set(made["xla"]["differs"]) == set(module.DIRECTIONS)
    assert all(distance < module.AGREEMENT for distance in made["xla"]["differs"].values())
    assert "differs" not in made["dense"]
    assert entry["judged"]["product"]["tflops"] is None and entry["judged"]["agrees"] is None


def figure(module, tflops: float, distance: float = 0.004) -> dict:
    return {**{direction: {"tflops": tflops} for direction in module.DIRECTIONS}, "differs": {"product": distance}}


def test_products_are_judged_by_other_grouped_ones_by_dense_ones_and_by_targets(benchmark) -> None:
    module = benchmark("grouped_matmul")
    made = functools.partial(figure, module)
    fields = asdict(module.Case(65536, 8, 4096, 14336, product_target=680))

    def judge(**found: dict) -> dict:
        return module.judge({**fields, "implementations": found})

    others = {"xla": made(900), "dense": made(770), "torch_dense": made(780), "torch_grouped": made(600)}
    judged = judge(mosaic=made(690), **others)
    assert judged["agrees"] and judged["product"]["best_of_others"] == "torch_grouped"
    assert judged["product"]["ratio"] == pytest.approx(690 / 600)
    assert judged["product"]["of_dense"] == pytest.approx(690 / 780)
    assert judged["product"]["target_met"] and judged["gradient"]["target_met"] is None
    for mosaic in ({"error": "no"}, made(900, 0.5), made(900, float("nan"))):
        nothing = judge(mosaic=mosaic, **others)["product"]
        assert [nothing[name] for name in ("tflops", "ratio", "of_dense", "target_met")] == [None] * 4


def test_the_cases_with_many_rows_of_an_expert_have_targets(benchmark) -> None:
    """TFLOP/s on one H200: by 1,000 rows of an expert and by 512."""
    module = benchmark("grouped_matmul")
    for case in module.CASES:
        rows = case.pairs / case.experts
        wanted = (680, 700) if rows > 1000 else (600, None) if rows > 500 else (None, None)
        assert (case.product_target, case.product_transposed_target, case.gradient_target) == (wanted[0], *wanted)


@pytest.mark.slow
def test_the_programs_of_a_case_compile_for_an_h200(benchmark) -> None:
    module = benchmark("grouped_matmul")
    case = module.CASES[2]
    gpu = NamedSharding(Mesh(np.array(gpu_devices("h200", 1)), ("x",)), PartitionSpec())
    for stage in module.lower(case, module.ours(case, "NVIDIA H200"), gpu).values():
        compiled = stage.compile()
        assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 1
        # nothing but the kernel is timed
        assert compiled.memory_analysis().temp_size_in_bytes < 2**16


class Tensor(np.ndarray):
    """An array with what is asked of a tensor."""

    def transpose(self, first, second):
        return np.swapaxes(self, first, second)


class Torch:
    """The calls of PyTorch 2.11 that the benchmark makes, by its signatures: tests have no PyTorch."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.int32, self.bfloat16 = "int32", "float32"
        self.nn = self.functional = self.cuda = self

    def is_available(self):
        return False

    def manual_seed(self, seed):
        pass

    def tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        return np.asarray(data, dtype)

    def randn(self, size, *, dtype=None, device=None):
        return np.zeros(size, dtype).view(Tensor)

    def matmul(self, input, other):
        assert input.ndim == other.ndim == 2
        return input @ other

    def grouped_mm(self, mat_a, mat_b, *, offs=None, bias=None, out_dtype=None):
        assert mat_a.shape[-1] == mat_b.shape[-2]
        self.calls.append((mat_a.shape, mat_b.shape, offs.tolist()))


def test_pytorchs_functions_are_called_as_they_are_declared(benchmark, monkeypatch) -> None:
    module, case = benchmark("grouped_matmul_torch"), benchmark("grouped_matmul").Case(100, 3, 8, 16)
    monkeypatch.setattr(module, "interleaved", functools.partial(module.interleaved, rounds=2, round_seconds=0.001))
    torch = Torch()
    made = module.measure(case, module.PRODUCTS, torch)
    assert set(made) == {"torch_grouped", "torch_dense"} and "error" not in str(made)
    (rows, ends), *_ = {(call[0][0], tuple(call[2])) for call in torch.calls if call[0][1] == 8}
    # each expert's rows end at a multiple of 16 bytes
    assert ends[-1] == rows and all(end % 8 == 0 for end in ends)
    assert all(0 <= size - count < 8 for size, count in zip(np.diff([0, *ends]), case.counts, strict=True))
    assert {(a, b) for a, b, _ in torch.calls} == {
        ((rows, 8), (3, 8, 16)),
        ((rows, 16), (3, 16, 8)),
        ((8, rows), (rows, 16)),
    }


def test_a_table_of_grouped_products(benchmark) -> None:
    module, table = benchmark("grouped_matmul"), benchmark("table")
    case = asdict(module.Case(65536, 8, 4096, 14336))
    ours = {"cases": [{**case, "implementations": {name: figure(module, 690) for name in ("mosaic", "dense")}}]}
    torch = {"cases": [{**case, "implementations": {"torch_grouped": {"product": {"tflops": 600}}}}]}
    sections = {"grouped_jax": {"result": ours}, "grouped_torch": {"incomplete": True, "result": torch}}
    text = table.grouped_tables([{"date": "2026-01-02", "device": "NVIDIA H200", "sections": sections}])
    assert "(grouped_torch did not finish)" in text
    figures = "690 / 690 / 690 | 690 / 690 / 690 | 600 / - / - | 1.15 / - / - | 1.00 / 1.00 / 1.00 |"
    assert f"| 65,536 | 8 | 4,096 x 14,336 | 0.0 | {figures}" in text
    assert table.grouped_tables([{"date": "2026-01-02", "device": "NVIDIA H200", "sections": {}}]) == ""

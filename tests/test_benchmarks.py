"""The benchmarks' commands: what they print and write, and what they make of sections that fail."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtron.config import UserError, load
from jaxtron.gpus import gpu_named
from jaxtron.plan.rehearsal import rehearse
from jaxtron.train.config import Configuration

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--model.num_layers", "1", "--model.hidden_size", "32", "--data.sequence_length", "16")


def run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    variables = os.environ | {"XLA_FLAGS": ""} | (environment or {})
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/, which is not installed with the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_the_train_step_on_two_devices(tmp_path: Path):
    flags = ("--devices", "2", "--train.global_batch", "8", "--benchmark.steps", "3", "--benchmark.warmup", "1")
    done = run("benchmarks.train", "configs/gpt_tiny.yaml", *TINY, *flags, "--benchmark.output", str(tmp_path))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (file,) = tmp_path.iterdir()
    result = json.loads(done.stdout)
    assert json.loads(file.read_text()) == result
    assert file.name == f"{result['date']}-cpu-gpt_tiny.json"
    assert (result["device_count"], result["mesh"]["data"], result["tokens_per_step"]) == (2, 2, 128)
    times = result["step_milliseconds"]
    assert 0 < times["min"] <= times["median"] <= times["p90"] and times["steps"] == 3
    assert result["tokens_per_second"] == pytest.approx(128 / times["median"] * 1e3, rel=1e-2)
    # a CPU has neither: not zero, not a number of something else
    assert result["mfu"] is None and "device_peak_bytes" not in result
    assert 0 < result["predicted_peak_bytes"] < result["process_max_rss_bytes"]
    assert 0 < result["loss_after"] < 6


def test_without_a_gpu_one_line():
    done = run("benchmarks.gpu")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no NVIDIA GPU ") and done.stderr.count("\n") == 1


def test_a_section_that_fails_is_recorded_as_that(benchmark):
    def section(code: str, seconds: float = 30) -> dict:
        return benchmark("gpu").run_section([sys.executable, "-c", code], seconds)

    assert section("print('noise'); print('{\"a\": 1}')")["result"] == {"a": 1}
    assert section('print(\'{"absent": "no torch"}\')')["reason"] == "no torch"
    crashed = section("raise SystemExit('out of memory')")
    assert (crashed["status"], crashed["stderr"]) == ("failed", ["out of memory"])
    assert section("print('hello')")["status"] == "failed"
    assert section("import time; time.sleep(60)", seconds=1)["status"] == "timeout"
    assert section("", seconds=0)["status"] == "skipped"


def test_a_case_that_a_library_refuses_has_no_number(benchmark):
    attention = benchmark("attention")

    def refuse(case):
        raise NotImplementedError("not this one")

    cases = attention.report({"cudnn": lambda case: (1.0, 2.0), "other": refuse})["cases"]
    assert len(cases) == 2 * len(attention.CASES)
    # 2 x 2 x S^2 / 2 x D a head, 5 products backward for 2 forward
    assert cases[0]["forward_tflops"] == pytest.approx(2e-12 * 4 * 32 * 4096**2 * 64)
    assert cases[0]["backward_tflops"] == pytest.approx(1.25 * cases[0]["forward_tflops"])
    assert cases[-1]["error"] == "NotImplementedError: not this one" and "forward_tflops" not in cases[-1]


def test_tables_between_the_marks_of_a_readme(tmp_path: Path):
    train = {
        **{"benchmark": "train", "name": "gpt", "date": "2026-01-02", "device": "NVIDIA H200", "device_count": 2},
        **{"mesh": {"data": 1, "tensor": 2}, "parameters": 1.3e9, "tokens_per_step": 65536, "mfu": 0.4},
        **{"step_milliseconds": {"median": 1500.0}, "tokens_per_second": 43690.7, "compile_seconds": 60.2},
        **{"device_peak_bytes": 80 * 2**30, "predicted_peak_bytes": 83 * 2**30, "versions": {"jax": "0.11.2"}},
    }
    ceilings = {"matmul_size": 8192, "matmul_tflops": 780.4, "copy_gigabytes_per_second": 4300.2}
    case = {"causal": True, "head_dim": 64, "length": 4096}
    cudnn = {**case, "implementation": "cudnn", "forward_tflops": 500.2, "backward_tflops": 400.0}
    attention = {"cases": [cudnn, {**case, "implementation": "other", "error": "no"}]}
    sections = {"ceilings": {"result": ceilings}, "attention_jax": {"result": attention}, "train": {"status": "failed"}}
    gpu = {"benchmark": "gpu", "date": "2026-01-02", "device": "NVIDIA H200", "sections": sections}
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    (results / "a.json").write_text(json.dumps(train))
    (results / "b.json").write_text(json.dumps(gpu))
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    command = ("benchmarks.table", "--results", str(results), "--readme", str(readme))
    assert run(*command).returncode == 0
    text = readme.read_text()
    assert run(*command).returncode == 0 and readme.read_text() == text
    assert text.startswith("before\n<!-- benchmarks -->\n| date |") and text.endswith("\n<!-- /benchmarks -->\nafter\n")
    row = "| 2 NVIDIA H200 (tensor 2) | 1,300.0M | 65,536 | 1,500.0 | 43,691 | 40.0 % | 80.0 (83.0) | 60 | 0.11.2 |"
    assert f"| 2026-01-02 | gpt {row}" in text and text.count("| 2026-01-02 |") == 1
    assert "| causal | 64 | 4,096 | 500 / 400 | - |" in text and "780 TFLOP/s" in text and "old" not in text
    readme.write_text("no marks")
    assert run(*command).returncode == 2


def test_a_result_that_cannot_be_kept_is_said_before_the_run(benchmark, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        benchmark("record").destination(str(tmp_path / "file" / "results"), "gpt", "NVIDIA H200")


@pytest.mark.slow
def test_the_billion_parameter_recipe_fits_one_h200():
    planned = rehearse(load(Configuration, ROOT / "configs" / "gpt_1b.yaml"), gpu="h200", num_gpus=1)
    assert 1.2e9 < planned.trainer.blueprint.num_parameters < 1.5e9
    # JAX takes three quarters of the memory unless told otherwise
    assert planned.memory.peak < 0.75 * gpu_named("h200").memory_bytes

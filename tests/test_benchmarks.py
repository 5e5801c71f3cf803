"""The benchmarks' commands: what they print and write, and what they make of sections that fail."""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtron.config import UserError, load
from jaxtron.gpus import gpu_named
from jaxtron.models.work.operations import Product
from jaxtron.plan.compiled.deviceless import gpu_devices
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.machine import machine_named
from jaxtron.run.configuration import Configuration
from tests.support.compiling import QUICK

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--model.num_layers", "1", "--model.hidden_size", "32", "--data.sequence_length", "16")


def run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    variables = os.environ | {"XLA_FLAGS": QUICK} | (environment or {})
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
    # a CPU has none of these: not zero, not a number of something else
    assert result["mfu"] is None and "device_peak_bytes" not in result and result["plan"] is None
    assert [line.split(" (")[0] for line in result["attention"]] == ["attention: materialized"]
    assert 0 < result["predicted_peak_bytes"] < result["process_max_rss_bytes"]
    assert 0 < result["loss_after"] < 6


@pytest.mark.parametrize("place, timed", [(3, 2), (1, None)])
def test_ctrl_c_reports_the_steps_so_far(benchmark, place: int, timed: int | None):
    train, done = benchmark("train"), []

    def compiled(state, batch):
        done.append(batch)
        if len(done) == place:
            os.kill(os.getpid(), signal.SIGINT)
        return state, {"loss": 2.0}

    config = train.BenchmarkConfig(steps=10, warmup=1)
    if timed is None:
        with pytest.raises(UserError, match="before a step was timed"):
            train.time_steps(compiled, None, None, config)
    else:
        seconds, loss = train.time_steps(compiled, None, None, config)
        assert (len(seconds), loss) == (timed, 2.0)
    assert len(done) == place


def test_products_of_a_models_own_shapes(benchmark):
    """Of the recipe for one GPU: 16,384 tokens of a microbatch through joined projections, and the head."""
    ceilings, config = benchmark("ceilings"), load(Configuration, ROOT / "configs" / "gpt_1b.yaml")
    found = [(one.m, one.n, one.k) for one in ceilings.products(config, "NVIDIA H200")]
    tokens, hidden, vocab = 8 * 2048, 2048, config.model.padded_vocab
    assert found[0] == (tokens, vocab, hidden) and (tokens, 3 * hidden, hidden) in found
    assert len(set(found)) == len(found) and {tokens} == {max(size for size in one if size != vocab) for one in found}
    measured = ceilings.measure(Product(48, 32, 16))
    assert measured["tflops"] == pytest.approx(2e-9 * 48 * 32 * 16 / measured["milliseconds"])


def test_without_a_gpu_one_line():
    done = run("benchmarks.gpu")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no NVIDIA GPU ") and done.stderr.count("\n") == 1


def test_attention_is_measured_and_what_refuses_has_no_number(benchmark, capfd):
    attention = benchmark("attention")
    case = attention.Case(48, 16, heads=4, kv_heads=2, tokens=96, documents=3, window=20)
    plain = {name: functools.partial(attention.ours, implementation=name) for name in ("reference", "xla")}

    def measure(case):
        return attention.measure(case, {"mosaic": attention.ours, **plain}, "cpu")

    (entry,) = attention.report([case], measure, {"tokamax": "not installed"})["cases"]
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cases"] == [entry]
    made = entry["implementations"]
    assert "Hopper" in made["mosaic"]["error"] and "forward" not in made["mosaic"]
    for direction, products in (("forward", 2), ("backward", 5)):
        times = made["xla"][direction]["milliseconds"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        flops = made["xla"][direction]["tflops"] * times["median"] * 1e9
        assert flops == pytest.approx(entry["flops"] * products / 2)
    # both right, rounded each in its own way; the reference of other inputs would be far
    assert made["xla"]["differs_from"] == "reference" and set(made["xla"]["differs"]) == {"out", "dq", "dk", "dv"}
    assert all(0 < distance < attention.AGREEMENT for distance in made["xla"]["differs"].values())
    assert entry["judged"]["forward"]["tflops"] is None and entry["judged"]["agrees"] is None


def test_flops_are_those_of_the_pairs_that_attend(benchmark):
    case = benchmark("attention").Case
    assert case(4096, 64, heads=32, tokens=4096, causal=False).flops == 4 * 32 * 4096**2 * 64
    assert case(4096, 64, heads=32, tokens=8192).flops == 2 * (4 * 32 * 4096**2 / 2 * 64)
    # a window of all is causal; of one eighth, 1/8 less half its square of the whole square
    assert case(4096, 64, window=4096).flops == case(4096, 64).flops
    assert case(4096, 64, window=512).flops == pytest.approx(case(4096, 64).flops * 2 * (1 / 8 - 1 / 128))
    packed = case(4096, 64, documents=4, tokens=4096)
    assert sum(packed.lengths) == 4096 and len(packed.lengths) == 4
    assert packed.flops == pytest.approx(sum(case(n, 64, tokens=n).flops for n in packed.lengths))


def test_the_kernels_of_a_case_compile_for_an_h200(benchmark):
    """As the benchmark lowers them: by documents, which no other case has."""
    attention = benchmark("attention")
    (case,) = [case for case in attention.CASES if case.documents > 1]
    gpu = NamedSharding(Mesh(np.array(gpu_devices("h200", 1)), ("x",)), PartitionSpec())
    stages = attention.lower(case, attention.ours(case, "NVIDIA H200"), gpu)
    forward, kept, backward = (stage.compile().as_text() for stage in stages)
    kernel = 'custom_call_target="mosaic_gpu'
    # the backward is timed alone: nothing of the forward is in it again
    assert [text.count(kernel) for text in (forward, kept, backward)] == [1, 1, 1]


def figure(tflops: float, distance: float = 0.004) -> dict:
    return {
        "forward": {"tflops": tflops},
        "backward": {"tflops": tflops / 2},
        "differs": {"out": distance},
    }


def test_targets_are_judged_by_what_was_measured(benchmark):
    attention = benchmark("attention")
    fields = asdict(attention.Case(4096, 128, forward_target=600, backward_target=500))

    def judge(**found: dict) -> dict:
        return attention.judge({**fields, "implementations": found})

    # the deterministic one is ours too: no rival
    judged = judge(mosaic=figure(620), mosaic_deterministic=figure(900), cudnn=figure(580), tokamax={"error": "no"})
    assert judged["agrees"] and judged["forward"]["best_of_others"] == "cudnn"
    assert judged["forward"]["ratio"] == pytest.approx(620 / 580)
    assert (judged["forward"]["aim_met"], judged["forward"]["target_met"]) == (True, True)
    assert (judged["backward"]["aim_met"], judged["backward"]["target_met"]) == (True, False)
    slower = judge(mosaic=figure(620), cudnn=figure(600))["forward"]
    assert (slower["aim_met"], slower["target_met"]) == (False, True)
    # neither a failure nor a wrong result is a speed
    for mosaic in ({"error": "no"}, figure(900, 0.5), figure(900, float("nan"))):
        nothing = judge(mosaic=mosaic, cudnn=figure(580))["forward"]
        assert [nothing[name] for name in ("tflops", "ratio", "aim_met", "target_met")] == [None] * 4
    alone = judge(mosaic=figure(620))["forward"]
    assert (alone["best_of_others"], alone["aim_met"], alone["target_met"]) == (None, None, True)


def test_the_targets_that_were_set(benchmark):
    """TFLOP/s on one H200, as the issue of the kernels has them."""
    found = {}
    for case in benchmark("attention").CASES:
        key = (case.head_dim, "causal" if case.causal else "full", case.length)
        for direction in ("forward", "backward"):
            target = getattr(case, f"{direction}_target")
            if target is not None:
                found[direction, *key] = target
    assert found == {
        ("forward", 128, "causal", 4096): 600,
        ("forward", 128, "causal", 16384): 640,
        ("forward", 128, "full", 16384): 690,
        ("forward", 64, "causal", 16384): 500,
        ("forward", 256, "causal", 16384): 650,
        ("backward", 128, "full", 16384): 560,
        ("backward", 128, "causal", 8192): 500,
        ("backward", 64, "full", 16384): 470,
        ("backward", 256, "causal", 16384): 350,
    }


# a worker whose kernels end it, hang it, or are fine
WORKER = """
import json, os, sys, time
def say(**said): print(json.dumps(said), flush=True)
print("noise of a library")
for line in sys.stdin:
    asked = json.loads(line)
    found = {}
    for name in asked["implementations"]:
        say(begins=name)
        if (name, asked["case"]["length"]) == ("crashes", 4096): os.abort()
        if (name, asked["case"]["length"]) == ("hangs", 4096): time.sleep(60)
        found[name] = os.getpid()
    say(begins="all in turns")
    if asked["case"]["length"] == 8192: say(ended="device lost"); sys.exit(3)
    say(measured=found)
    if asked["case"]["length"] == 1024: sys.exit()
"""


def test_a_kernel_that_ends_its_process_does_not_take_the_others_along(benchmark):
    attention = benchmark("attention")
    names = ("fine", "crashes", "hangs", "last")
    with benchmark("side_by_side").Worker([sys.executable, "-c", WORKER], names, patience=3) as worker:
        first = worker.measure(attention.Case(4096, 64))
        assert first["crashes"]["error"].startswith("its process ended with code -6")
        assert first["hangs"]["error"] == "no sign of life for 3 s"
        assert first["fine"] == first["last"] and isinstance(first["fine"], int)
        # lost while all took turns: nobody has a figure
        second = worker.measure(attention.Case(8192, 64))
        assert {entry["error"] for entry in second.values()} == {"its process ended with code 3 device lost"}
        assert set(second) == set(names)
        # and each gets its chance again in the next case, which the same process goes on with
        third, fourth = (worker.measure(attention.Case(length, 64)) for length in (2048, 16384))
        assert set(third.values()) == set(fourth.values()) and third["crashes"] != first["fine"]
        worker.measure(attention.Case(1024, 64))
        worker.process.wait(10)
        assert isinstance(worker.measure(attention.Case(2048, 64))["fine"], int)
    assert worker.process is None


def test_what_hangs_again_and_again_is_not_waited_for(benchmark):
    case = benchmark("attention").Case(4096, 64)
    with benchmark("side_by_side").Worker([sys.executable, "-c", WORKER], ("hangs", "fine"), patience=0.5) as worker:
        errors = [worker.measure(case)["hangs"]["error"] for _ in range(3)]
        assert errors == [*["no sign of life for 0 s"] * 2, "not tried: it hung 2 times before"]
        assert isinstance(worker.measure(case)["fine"], int)


def test_a_hang_costs_a_part_of_a_section(benchmark):
    section_patience = benchmark("side_by_side").section_patience
    name = benchmark("side_by_side").SECTION_SECONDS
    assert [section_patience(given) for given in ({}, {name: "200"}, {name: "40"}, {name: "3600"})] == [90, 50, 20, 90]


def test_a_worker_answers_with_what_it_measured(benchmark, monkeypatch, capsys):
    attention = benchmark("attention")
    case = attention.Case(64, 16, window=8)
    question = json.dumps({"case": asdict(case), "implementations": ["xla"]})
    monkeypatch.setattr("sys.stdin", [question, question])
    asked = []

    def measure(case, names, begins):
        asked.append((case, names))
        begins("xla")
        if len(asked) > 1:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return {"xla": {"forward": 1}}

    with pytest.raises(RuntimeError):
        benchmark("side_by_side").serve(attention.Case, measure)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert asked == [(case, ["xla"])] * 2
    assert said[:4] == [
        {"ready": True},
        {"begins": "xla"},
        {"measured": {"xla": {"forward": 1}}},
        {"begins": "xla"},
    ]
    assert said[4] == {"ended": "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"}


class Torch:
    """The calls of PyTorch 2.11 that the benchmark makes, by its signatures: tests have no PyTorch."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.int32, self.nn = "int32", self
        self.functional = self.attention = self
        self.SDPBackend = self
        self.FLASH_ATTENTION, self.CUDNN_ATTENTION = "flash", "cudnn"

    def tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        return np.asarray(data, dtype)

    @contextlib.contextmanager
    def sdpa_kernel(self, backends, set_priority=False):
        self.calls.append(("sdpa_kernel", backends))
        yield

    def scaled_dot_product_attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        self.calls.append(("sdpa", query.shape, key.shape, is_causal, enable_gqa))
        return query

    def varlen_attn(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
    ):
        self.calls.append(("varlen", query.shape, cu_seq_q.tolist(), max_q, window_size))
        return query


class Heads(np.ndarray):
    """An array with what is asked of a tensor."""

    device = "cuda"

    def transpose(self, first, second):
        return np.swapaxes(self, first, second)

    def flatten(self, first, last):
        assert (first, last) == (0, 1)
        return self.reshape(-1, *self.shape[2:])

    def view(self, shape):
        return self.reshape(shape)


def test_pytorchs_functions_are_called_as_they_are_declared(benchmark, monkeypatch):
    module, case = benchmark("attention_torch"), benchmark("attention").Case
    torch = Torch()
    monkeypatch.setattr(module.importlib, "import_module", lambda name: torch)

    def call(backend: str, asked) -> list[tuple]:
        torch.calls.clear()
        parts = [np.zeros(shape).view(Heads) for shape in asked.shapes]
        assert module.attention(asked, torch, backend, parts[:3])().shape == asked.shapes[3]
        return list(torch.calls)

    chosen, made = call("CUDNN_ATTENTION", case(32, 8, heads=4, kv_heads=2, tokens=64))
    assert chosen == ("sdpa_kernel", "cudnn") and made == ("sdpa", (2, 4, 32, 8), (2, 2, 32, 8), True, True)
    assert call("FLASH_ATTENTION", case(32, 8, tokens=64, causal=False))[1][3:] == (False, False)
    # keys before a query: of a window of 5, 4
    (window,) = call("FLASH_ATTENTION", case(32, 8, tokens=64, window=5))
    assert window == ("varlen", (64, 16, 8), [0, 32, 64], 32, (4, 0))
    packed = case(32, 8, tokens=64, documents=3)
    ((_, shape, ends, longest, causal),) = call("FLASH_ATTENTION", packed)
    assert shape == (64, 16, 8) and np.diff(ends).tolist() == [*packed.lengths] * 2
    assert longest == max(packed.lengths) and causal == (-1, 0)
    for unknown in (case(32, 8, window=5), packed):
        with pytest.raises(NotImplementedError, match="neither windows nor documents"):
            call("CUDNN_ATTENTION", unknown)


@pytest.mark.slow
def test_the_plan_of_a_run_is_told_beside_it(benchmark):
    train = benchmark("train")
    config = load(train.TrainBenchmark, ROOT / "configs" / "gpt_tiny.yaml")
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 1, "hidden_size": 64})})
    assert train.start_plan(config, "NVIDIA RTX 5090", 1) is None
    with train.start_plan(config, "NVIDIA H200", 1) as planning:
        plan = planning.result()
    assert train.plan_line(plan).startswith("planned for h200: ") and " GiB of the program" in train.plan_line(plan)
    assert plan["gpu"] == "h200" and plan["fits"]
    # master weights and two moments in float32 at the least, and what the compiled step needs beside them
    parameters = config.model.num_layers * 12 * 64**2
    assert 12 * parameters < plan["program_bytes"] < 2**32
    # with what JAX's pool leaves of the GPU
    assert plan["program_bytes"] < plan["total_bytes"] < gpu_named("h200").memory_bytes
    expected = predict(config, config.mesh.shape(1), machine_named("h200"))
    assert plan["step_milliseconds"] == pytest.approx(1e3 * expected.step_seconds, rel=1e-2)
    assert plan["attention"][0].startswith("attention: ")


def test_a_plan_that_fails_is_told_as_that(benchmark, monkeypatch):
    train = benchmark("train")
    config = load(train.TrainBenchmark, ROOT / "configs" / "gpt_tiny.yaml")
    impossible = config.model_copy(update={"mesh": config.mesh.model_copy(update={"tensor": 3})})
    with train.start_plan(impossible, "NVIDIA H200", 1) as planning:
        assert "tensor" in planning.result()["error"]
    monkeypatch.setattr(train, "PLAN_SECONDS", 0.1)
    with train.start_plan(config, "NVIDIA H200", 1) as planning:
        assert planning.result() == {"error": "it took more than 0.1 s"}
    assert train.patience({"JAXTRON_SECTION_SECONDS": "0.1"}) == 0.05


def test_tables_between_the_marks_of_a_readme(benchmark, tmp_path: Path):
    train = {
        **{"benchmark": "train", "name": "gpt", "date": "2026-01-02", "device": "NVIDIA H200", "device_count": 2},
        **{"mesh": {"data": 1, "tensor": 2}, "parameters": 1.3e9, "tokens_per_step": 65536, "mfu": 0.4},
        **{"step_milliseconds": {"median": 1500.0}, "tokens_per_second": 43690.7, "compile_seconds": 60.2},
        **{"device_peak_bytes": 80 * 2**30, "predicted_peak_bytes": 83 * 2**30, "versions": {"jax": "0.11.2"}},
    }
    planned = {
        **{**train, "name": "planned", "plan": {"program_bytes": 81 * 2**30, "step_milliseconds": 1450.0}},
        "attention": ["attention: mosaic, the fastest that runs on NVIDIA H200"],
    }
    case = benchmark("attention").Case
    plain, packed = case(4096, 64, forward_target=600), case(16384, 128, kv_heads=4, window=4096, documents=8)
    ours = [
        {**asdict(plain), "implementations": {"mosaic": figure(600), "cudnn": figure(500.2)}},
        {**asdict(packed), "implementations": {"mosaic": figure(300), "cudnn": {"error": "no"}}},
    ]
    torch = [{**asdict(plain), "implementations": {"torch_flash": {"forward": {"tflops": 400}}}}]
    sections = {
        "ceilings": {"result": {"matmul_size": 8192, "matmul_tflops": 780.4, "copy_gigabytes_per_second": 4300.2}},
        "attention_jax": {"result": {"cases": ours}},
        "attention_torch": {"status": "timeout", "incomplete": True, "result": {"cases": torch}},
        "train_xla": {"status": "failed"},
        "train_cudnn": {"result": {**train, "name": "by_cudnn"}},
    }
    gpu = {"benchmark": "gpu", "date": "2026-01-02", "device": "NVIDIA H200", "sections": sections}
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    for name, result in {"a": train, "b": gpu, "c": planned}.items():
        (results / f"{name}.json").write_text(json.dumps(result))
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    command = ("benchmarks.table", "--results", str(results), "--readme", str(readme))
    assert run(*command).returncode == 0
    text = readme.read_text()
    assert run(*command).returncode == 0 and readme.read_text() == text
    assert text.startswith("before\n<!-- benchmarks -->\n| date |") and text.endswith("\n<!-- /benchmarks -->\nafter\n")
    row = "| 2 NVIDIA H200 (tensor 2) | 1,300.0M | 65,536 | 1,500.0 | 43,691 | 40.0 % |"
    assert f"| 2026-01-02 | gpt {row} - | 80.0 (83.0) | - | 60 | 0.11.2 |" in text
    assert f"| 2026-01-02 | planned {row} 1,450.0 | 80.0 (81.0) | mosaic | 60 | 0.11.2 |" in text
    assert text.count("| 2026-01-02 |") == 3 and "| by_cudnn |" in text and "780 TFLOP/s" in text and "old" not in text
    # of all processes' figures: the ratio to the fastest of the others
    assert "| causal | 64 | 16 / 16 | 4,096 | 600 / 300 | 500 / 250 | 400 / - | 1.20 / 1.20 |" in text
    assert "| causal, window 4,096, 8 documents | 128 | 16 / 4 | 16,384 | 300 / 150 | - | - | - |" in text
    assert "(attention_torch did not finish)" in text
    readme.write_text("no marks")
    assert run(*command).returncode == 2


def test_a_result_that_cannot_be_kept_is_said_before_the_run(benchmark, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        benchmark("record").destination(str(tmp_path / "file" / "results"), "gpt", "NVIDIA H200")

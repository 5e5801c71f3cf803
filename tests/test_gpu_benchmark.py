"""`make gpu`: its sections, each a process with so many seconds, and what is made of all of them."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/, which is not installed with the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def figure(tflops: float, distance: float = 0.004) -> dict:
    return {
        "forward": {"tflops": tflops},
        "backward": {"tflops": tflops / 2},
        "differs": {"out": distance},
    }


def test_a_section_that_fails_is_recorded_as_that(benchmark):
    def section(code: str, seconds: float = 30) -> dict:
        return benchmark("section").run_section([sys.executable, "-c", code], seconds)

    assert section("print('noise'); print('{\"a\": 1}')")["result"] == {"a": 1}
    assert section('print(\'{"absent": "no torch"}\')')["reason"] == "no torch"
    crashed = section("raise SystemExit('out of memory')")
    assert (crashed["status"], crashed["stderr"]) == ("failed", ["out of memory"])
    assert section("print('hello')")["status"] == "failed"
    assert section("import time; time.sleep(60)", seconds=1)["status"] == "timeout"
    assert section("", seconds=0)["status"] == "skipped"


def test_what_a_section_printed_before_its_end_is_kept(benchmark):
    def section(code: str, seconds: float = 30) -> dict:
        return benchmark("section").run_section([sys.executable, "-c", code], seconds)

    many_lines = 'print(\'{\\n "a": {\\n  "b": 3\\n }\\n}\')'
    assert section(f"print('{{\"a\": 1}}'); {many_lines}")["result"] == {"a": {"b": 3}}
    ended = section("print('{\"a\": 1}'); print('{\"a\": 2}'); print('{\"a\"'); import time; time.sleep(60)", seconds=3)
    assert (ended["status"], ended["incomplete"], ended["result"]) == ("timeout", True, {"a": 2})
    crashed = section("print('{\"a\": 1}'); import os; os.abort()")
    assert (crashed["status"], crashed["incomplete"], crashed["result"]) == ("failed", True, {"a": 1})
    assert "incomplete" not in section("print('{\"a\": 1}')")


def test_tests_that_ran_before_the_end_are_counted(benchmark, tmp_path: Path):
    (tmp_path / "test_it.py").write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('name', ['full, 64', '(40, 24)', 'a PASSED one'])\n"
        "def test_right(name): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "def test_left_out(): pytest.skip('not here')\n"
        "def test_broken(nothing): pass\n"
        "@pytest.mark.gpu\n"
        "def test_not_selected(): pass\n"
        "def test_hangs(): time.sleep(60)\n"
        "def test_never(): pass\n"
    )
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "-m", "not gpu"]
    words = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    ended = benchmark("section").run_section(words, 16)
    assert (ended["status"], ended["incomplete"]) == ("timeout", True)
    found = ended["result"]
    assert {name: found[name] for name in COUNTS} == COUNTS
    assert [name.split("::")[1] for name in found["not_passed"]] == ["test_broken", "test_wrong"]
    # and which one it was that took the rest of the time
    assert [name.split("::")[1] for name in found["unfinished"]] == ["test_hangs"] and "test_hangs" in ended["reason"]
    assert [*found["by_file"].values()] == [{"passed": 3, "failed": 1, "error": 1, "skipped": 1}]
    # interrupted, it still says why
    assert any("one is not two" in line for line in found["report"])


COUNTS = {"selected": 8, "passed": 3, "failed": 1, "error": 1, "skipped": 1}
# of pytest 9.2 with xdist 3.8, cut off
TWO_PROCESSES = """\
2 workers [8 items]
scheduling tests via LoadScheduling

test_it.py::test_right[full, 64]
[gw0] [ 12%] PASSED test_it.py::test_right[full, 64]
test_it.py::test_right[(40, 24)]
[gw0] [ 25%] PASSED test_it.py::test_right[(40, 24)]
test_it.py::test_right[a PASSED one]
test_it.py::test_left_out
[gw0] [ 37%] SKIPPED test_it.py::test_left_out
test_it.py::test_hangs
[gw1] [ 50%] PASSED test_it.py::test_right[a PASSED one]
test_it.py::test_wrong
[gw1] [ 62%] FAILED test_it.py::test_wrong
test_it.py::test_broken
[gw1] [ 75%] ERROR test_it.py::test_broken
=========================== short test summary info ============================
FAILED test_it.py::test_wrong - AssertionError: one is not two
"""


def test_tests_of_several_processes_are_counted_once(benchmark):
    found = benchmark("section").outcomes(TWO_PROCESSES)
    assert {name: found[name] for name in COUNTS} == COUNTS
    assert found["not_passed"] == ["test_it.py::test_broken", "test_it.py::test_wrong"]
    assert found["unfinished"] == ["test_it.py::test_hangs"]


def test_sections_share_what_time_there_is(benchmark):
    gpu = benchmark("gpu")
    sections, limits, left = tuple(gpu.SHARES)[1:], [], sum(gpu.SHARES.values()) - gpu.SHARES["device"]
    assert sum(gpu.SHARES.values()) == 60 * gpu.GpuBenchmark().minutes and tuple(gpu.SHARES)[0] == "device"
    for number in range(len(sections)):
        limits.append(gpu.share(sections[number:], left))
        left -= limits[-1]
    assert limits == pytest.approx(list(gpu.SHARES.values())[1:]) and left == pytest.approx(0)
    # what the tests leave over is for the others
    assert gpu.share(sections[1:], 480 - 60) > gpu.SHARES["ceilings"]
    assert gpu.share(("train_xla",), 300) == 300
    # the first start may take long, but no longer than there is time
    assert (gpu.share(tuple(gpu.SHARES), 480), gpu.share(tuple(gpu.SHARES), 30)) == (60, 30)
    words = gpu.command("tests", gpu.GpuBenchmark())
    assert "tests/kernels/test_attention_gpu.py" in words and "tests/test_config.py" not in words
    for implementation in ("mosaic", "cudnn", "xla"):
        words = gpu.command(f"train_{implementation}", gpu.GpuBenchmark())
        assert words[2:6] == [
            "benchmarks.train",
            "configs/gpt_1b.yaml",
            "--model.attention.implementation",
            implementation,
        ]


def test_all_sections_in_one_file_judged_by_all(benchmark, monkeypatch, tmp_path: Path, capsys):
    gpu, attention = benchmark("gpu"), benchmark("attention")
    case = asdict(attention.Case(4096, 64, forward_target=600))
    ours = {"cases": [{**case, "implementations": {"mosaic": figure(620), "cudnn": figure(500)}}]}
    torch = {"cases": [{**case, "implementations": {"torch_flash": figure(640)}}]}
    step = {"plan": {"program_bytes": 40 * 2**30}, "predicted_peak_bytes": 41 * 2**30, "device_peak_bytes": 42 * 2**30}
    ceilings, sleep = {"matmul_tflops": 780}, "import time; time.sleep(60)"
    device = {"count": 1, "versions": {"jax": "0.11.7", "cuda_runtime": "13.0"}}
    printed = {
        "device": device,
        "ceilings": ceilings,
        "attention_jax": ours,
        "attention_torch": torch,
        "train_mosaic": step,
    }
    scripts = {section: f"print({json.dumps(json.dumps(result))})" for section, result in printed.items()}
    scripts |= {"attention_torch": f"{scripts['attention_torch']}; {sleep}", "train_xla": "raise SystemExit('no room')"}
    monkeypatch.setattr(gpu, "expects_gpu", lambda: True)
    monkeypatch.setattr(gpu, "command", lambda section, config: [sys.executable, "-uc", scripts[section]])
    monkeypatch.setattr(gpu, "SHARES", {**gpu.SHARES, "attention_torch": 40, "train_mosaic": 40, "train_xla": 40})
    # put back what finding CUDA sets
    monkeypatch.setattr(os, "environ", dict(os.environ))
    file, began = tmp_path / "result.json", time.monotonic()
    assert gpu.main(["--sections", str([*scripts]), "--minutes", "0.2", "--output", str(file)]) == 1
    # the hang too is within the time that was given
    assert time.monotonic() - began < 12 + 1
    result = json.loads(file.read_text())
    states = {section: outcome["status"] for section, outcome in result["sections"].items()}
    measured = dict.fromkeys(printed, "ok")
    assert states == {**measured, "attention_torch": "timeout", "train_xla": "failed"}
    assert result["sections"]["ceilings"]["result"] == ceilings
    (judged,) = [entry["judged"]["forward"] for entry in result["attention"]]
    assert (judged["best_of_others"], judged["target_met"]) == ("torch_flash", True)
    assert judged["ratio"] == pytest.approx(620 / 640)
    # what JAX says of itself once it runs counts, and memory lies beside the plan
    assert (result["versions"]["jax"], result["versions"]["cuda_runtime"]) == ("0.11.7", "13.0")
    (memory,) = result["memory"]
    assert (memory["section"], memory["held_over_planned"]) == ("train_mosaic", 1.05)
    # every word is kept, and said in a line
    assert (tmp_path / "result-logs" / "train_xla.err").read_text() == "no room\n"
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"train_xla: failed \(\d s\) exit code 1: no room$", line) for line in lines)
    assert "memory of train_mosaic: planned 40.0 GiB, the compiler's sum 41.0 GiB, held 42.0 GiB" in lines


def test_without_jax_on_the_gpu_nothing_else_is_tried(benchmark, monkeypatch, tmp_path: Path):
    """On this machine JAX has no GPU: the first section says so, and the others cost nothing."""
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "expects_gpu", lambda: True)
    monkeypatch.setattr(os, "environ", {**os.environ, "JAX_PLATFORMS": "cpu"})
    file = tmp_path / "result.json"
    assert gpu.main(["--sections", "[device, tests, train_xla]", "--output", str(file)]) == 1
    states = {name: (one["status"], one["reason"]) for name, one in json.loads(file.read_text())["sections"].items()}
    assert states["device"] == ("failed", "exit code 2: error: JAX started on the cpu alone, and on no GPU")
    assert states["tests"] == states["train_xla"] == ("skipped", "JAX does not run on the GPU: see device")


def test_an_earlier_result_of_the_day_is_kept(benchmark, tmp_path: Path):
    unused, file = benchmark("gpu").unused, tmp_path / "gpu.json"
    assert unused(file) == file
    file.write_text("")
    assert unused(file) == tmp_path / "gpu-2.json"


def test_nothing_measured_is_not_ok(benchmark):
    section, case = benchmark("section"), asdict(benchmark("attention").Case(4096, 64))

    def cases(*found: dict) -> dict:
        return section.judged({"cases": [{**case, "implementations": one} for one in found]})

    no = {"error": "RuntimeError: no kernel\nand a long story"}
    assert cases({"mosaic": no, "cudnn": no}) == {
        "status": "failed",
        "reason": "nothing was measured; mosaic: RuntimeError: no kernel; cudnn: RuntimeError: no kernel",
    }
    # one that has no figure in any case
    partial = cases({"mosaic": no, "cudnn": figure(500)}, {"mosaic": no, "cudnn": no})
    assert partial == {"status": "partial", "reason": "no figures of mosaic: RuntimeError: no kernel"}
    assert cases({"mosaic": figure(600), "cudnn": figure(500)}, {"mosaic": no, "cudnn": no}) == {"status": "ok"}
    assert cases()["status"] == section.judged({})["status"] == section.judged({"a": None})["status"] == "failed"
    assert section.judged({"a": [{"b": 0.5}]})["status"] == "ok"
    assert section.judged({"platform": "cpu", "a": 1}) == {
        "status": "failed",
        "reason": "it ran on the cpu, and not on the GPU",
    }


def test_tests_that_were_all_skipped_are_not_ok(benchmark, tmp_path: Path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', [1, 2])\ndef test_left_out(n): pytest.skip('no GPU')\n"
    )
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not gpu", str(tmp_path)]
    found = benchmark("section").run_section(words, 30)
    assert (found["status"], found["reason"]) == ("failed", "no test passed: 2 skipped")
    assert any("no GPU" in line or "2 skipped" in line for line in found["result"]["report"])


def test_files_that_cannot_be_imported_are_told(benchmark, tmp_path: Path):
    (tmp_path / "test_it.py").write_text("import nothing_of_that_name\n")
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path)]
    found = benchmark("section").run_section(words, 30)
    assert found["status"] == "failed" and found["reason"].startswith("no test passed: ")
    assert found["reason"].endswith("test_it.py") or "test_it.py - " in found["reason"]


def test_plugins_of_the_machine_do_not_touch_the_tests(benchmark, monkeypatch, tmp_path: Path):
    """One that warns at the start is an internal error of a pytest whose warnings are errors."""
    plugin = tmp_path / "site" / "loud.py"
    plugin.parent.mkdir()
    plugin.write_text("import warnings\ndef pytest_configure(config): warnings.warn('benchmarks are off')\n")
    entry = plugin.parent / "loud-1.0.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (entry / "entry_points.txt").write_text("[pytest11]\nloud = loud\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_it.py").write_text("def test_right(): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(plugin.parent))
    options = ["-v", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), str(tmp_path)]
    bare = subprocess.run([sys.executable, "-m", "pytest", *options], capture_output=True, text=True)
    assert bare.returncode != 0 and "benchmarks are off" in bare.stdout + bare.stderr
    found = benchmark("section").run_section([sys.executable, "-m", "pytest", *options], 30)
    assert (found["status"], found["reason"]) == ("ok", "1 passed")


def test_a_section_that_hangs_costs_its_own_time(benchmark, tmp_path: Path):
    """Also where it hears no signal and leaves a child behind that keeps its output open."""
    child = "import time; time.sleep(100)"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('{\"a\": 1}');"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('stuck', file=sys.stderr); time.sleep(100)"
    )
    began = time.monotonic()
    found = benchmark("section").run_section([sys.executable, "-uc", code], 4, tmp_path / "it")
    assert time.monotonic() - began < 5
    assert (found["status"], found["result"], found["stderr"]) == ("timeout", {"a": 1}, ["stuck"])
    assert (tmp_path / "it.err").read_text() == "stuck\n"
    # what it printed has no figure: that is said too
    empty = benchmark("section").run_section([sys.executable, "-uc", f"print('{{}}'); {child}"], 2)
    assert empty["reason"] == "ended after 1 s; nothing was measured"
    nothing = benchmark("section").run_section([sys.executable, "-c", child], 2)
    assert nothing["reason"].startswith("ended after 1 s with nothing measured") and "result" not in nothing

"""`python -m benchmarks.gpu`: everything worth measuring on a machine with NVIDIA GPUs, in one JSON."""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks import attention, grouped_matmul, machine, record, ssd
from benchmarks.section import run_section
from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError
from jaxtron.runtime.devices import expects_gpu

Section = Literal[
    "device",
    "tests",
    "ceilings",
    "attention_jax",
    "attention_torch",
    "train_mosaic",
    "train_cudnn",
    "train_xla",
    "grouped_jax",
    "grouped_torch",
    "ssd_jax",
    "ssd_torch",
]

# seconds of each in the default eight minutes: right answers first, then what a step is made of, the step, and what
# some models have besides; of more or less time each has its share, and what one leaves over is shared among those
# after it
SHARES: dict[Section, int] = {
    "device": 15,
    "tests": 110,
    "ceilings": 25,
    "attention_jax": 80,
    "attention_torch": 35,
    "train_mosaic": 45,
    "train_cudnn": 45,
    "train_xla": 45,
    "grouped_jax": 35,
    "grouped_torch": 12,
    "ssd_jax": 23,
    "ssd_torch": 10,
}
# seconds that a section may take of the others' time: libraries are read from a cold disk in the first
LEAST: dict[Section, float] = {"device": 60.0}
# steps of a train section: three of them share what one had
STEPS = ("--benchmark.warmup", "2", "--benchmark.steps", "6")
# beyond these, processes wait for each other on the one GPU
MOST_TEST_PROCESSES = 8
# the exit code of `benchmarks.gpu` is 1 with one of these
BAD = ("failed", "timeout", "partial")


class GpuBenchmark(Config):
    """What `python -m benchmarks.gpu` measures."""

    config: str = "configs/gpt_1b.yaml"
    """The run whose train step is measured."""
    sections: tuple[Section, ...] = tuple(SHARES)
    """Which parts, in this order; each has a process of its own, so that one crash does not lose the rest."""
    minutes: float = Field(8.0, gt=0)
    """All sections end within this, whatever hangs; what was measured until a section's end is kept. Eight fit a
    command of ten, with the installation before them."""
    output: str | None = None
    """A .json file, or a folder that gets <date>-<device>-gpu.json (none: $OUT, else benchmarks/results)."""


def main(argv: list[str]) -> int:
    """Runs the sections, keeping the file complete after each; 1 if one failed, was cut off or measured only a part."""
    deadline = time.monotonic()
    purpose = "Benchmark this machine's NVIDIA GPUs."
    config = configure(GpuBenchmark, argv, program="python -m benchmarks.gpu", purpose=purpose)
    if config is None:
        return 0
    deadline += 60 * config.minutes
    if not expects_gpu():
        raise UserError(f"no NVIDIA GPU that JAX would use: {'; '.join(machine.lacking()) or 'unknown why'}")
    names = record.gpu_names() or ["unknown GPU"]
    path = unused(record.destination(config.output or os.environ.get("OUT") or str(record.RESULTS), "gpu", names[0]))
    folder = path.with_name(f"{path.stem}-logs")
    _make(folder)
    os.environ.update(machine.cuda_variables())
    result = {"benchmark": "gpu", **record.circumstances("gpu", names[0], len(names))}
    result |= {"cuda_root": os.environ.get("CUDA_ROOT"), "doubtful": machine.doubtful(), "minutes": config.minutes}
    for line in introduction(result):
        print(line, flush=True)
    result["sections"] = sections = {}
    for number, section in enumerate(config.sections):
        seconds = share(config.sections[number:], deadline - time.monotonic())
        if sections.get("device", {}).get("status") == "failed":
            outcome: dict[str, Any] = {"status": "skipped", "reason": "JAX does not run on the GPU: see device"}
        else:
            outcome = run_section(command(section, config), seconds, folder / section)
        sections[section] = outcome
        result |= summary(result)
        record.write(path, result)
        print(f"{section}: {said(outcome)}", flush=True)
    for line in result.get("memory", ()):
        print(memory_line(line))
    print(f"written to {path}, all that was said to {folder}")
    return int(any(outcome["status"] in BAD for outcome in sections.values()))


def unused(path: Path) -> Path:
    """The file, or one with a number behind its name where an earlier result of the day is not to be lost."""
    names = (path, *(path.with_name(f"{path.stem}-{number}.json") for number in range(2, 1000)))
    return next((name for name in names if not name.exists()), path)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} for what the sections say cannot be made: {error.strerror}") from None


def introduction(result: Mapping[str, Any]) -> Iterator[str]:
    """What is here and what is doubtful, a line each."""
    yield f"GPU: {result['device_count']} {result['device']}; commit {result['commit']}; CUDA in {result['cuda_root']}"
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    for sentence in result["doubtful"]:
        yield f"warning: {sentence}"


def said(outcome: Mapping[str, Any]) -> str:
    """A section in one line."""
    return " ".join(f"{outcome['status']} ({outcome.get('seconds', 0):.0f} s) {outcome.get('reason', '')}".split())


def share(sections: Sequence[Section], seconds: float) -> float:
    """Of the seconds left, what the first of these sections may take."""
    part = seconds * SHARES[sections[0]] / sum(SHARES[section] for section in sections)
    return min(seconds, max(part, LEAST.get(sections[0], 0.0)))


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is put together of several sections: kernels side by side, memory beside the plan, versions as JAX has them.

    A package's version is what is installed; what JAX says of itself and of its CUDA once it runs is what was measured.
    """
    device = result["sections"].get("device", {}).get("result", {})
    return {
        "versions": {**result["versions"], **device.get("versions", {})},
        "attention": attention.merged(results_of(result, "attention")),
        "grouped": grouped_matmul.merged(results_of(result, "grouped")),
        "ssd": ssd.merged(results_of(result, "ssd")),
        "memory": list(memory(result)),
    }


def memory(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of every step that was measured, bytes of a device: what was planned, what the compiler said, what was held."""
    for section, outcome in result["sections"].items():
        found = outcome.get("result")
        if section.startswith("train") and found:
            planned, held = (found.get("plan") or {}).get("program_bytes"), found.get("device_peak_bytes")
            yield {
                "section": section,
                "planned_bytes": planned,
                "compiled_bytes": found.get("predicted_peak_bytes"),
                "held_bytes": held,
                "held_over_planned": round(held / planned, 3) if held and planned else None,
            }


def memory_line(found: Mapping[str, Any]) -> str:
    """Memory of a step in one line."""
    names = {"planned_bytes": "planned", "compiled_bytes": "the compiler's sum", "held_bytes": "held"}
    parts = [f"{name} {found[key] / 2**30:.1f} GiB" for key, name in names.items() if found[key]]
    return f"memory of {found['section']}: {', '.join(parts)}"


def results_of(result: Mapping[str, Any], what: Literal["attention", "grouped", "ssd"]) -> list[dict[str, Any]]:
    """What a GPU's result has of attention, grouped products or state-space duality, complete or not."""
    found = (result.get("sections", {}).get(f"{what}_{by}", {}).get("result") for by in ("jax", "torch"))
    return [section for section in found if section]


def command(section: Section, config: GpuBenchmark) -> list[str]:
    """What a section runs."""
    kind, _, implementation = section.partition("_")
    if kind == "train":
        chosen = ["--model.attention.implementation", implementation]
        return [sys.executable, "-m", "benchmarks.train", config.config, *chosen, *STEPS]
    module = {
        "device": ["benchmarks.device"],
        "tests": ["pytest", *_pytest_words()],
        "ceilings": ["benchmarks.ceilings", config.config],
        "attention_jax": ["benchmarks.attention"],
        "attention_torch": ["benchmarks.attention_torch"],
        "grouped_jax": ["benchmarks.grouped_matmul"],
        "grouped_torch": ["benchmarks.grouped_matmul_torch"],
        "ssd_jax": ["benchmarks.ssd"],
        "ssd_torch": ["benchmarks.ssd_torch"],
    }[section]
    return [sys.executable, "-m", *module]


def _pytest_words() -> list[str]:
    """All tests that are marked for a GPU: most of their time is compilation, which more processes share."""
    files = sorted(path for path in (record.ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    processes = min(os.cpu_count() or 1, MOST_TEST_PROCESSES)
    parallel = ["-p", "xdist", "-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 1 else []
    # one file that cannot be imported does not keep the others from running; nor does a warning of this machine, whose
    # packages are others than those of the suite, make a kernel wrong
    options = ["-v", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-W", "default"]
    return ["-m", "gpu", *options, *parallel, *(str(path.relative_to(record.ROOT)) for path in files)]


if __name__ == "__main__":
    sys.exit(run_command(main))

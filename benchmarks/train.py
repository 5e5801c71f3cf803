"""`python -m benchmarks.train CONFIG.yaml [--setting value ...]`: the real train step on random tokens, as JSON."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import Field

from benchmarks import record
from benchmarks.side_by_side import SECTION_SECONDS
from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError, dump
from jaxtron.data.batch import TokenBatch
from jaxtron.data.loader import LocalBatch
from jaxtron.gpus import GPUS, peak_flops
from jaxtron.interrupts import finish_first
from jaxtron.models.decoder.cost import model_flops_per_token
from jaxtron.plan.compiled.deviceless import memory
from jaxtron.run.attention import attention_lines
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from jaxtron.run.state import TrainState
from jaxtron.runtime.start import start_runtime

# seconds after which a plan is given up: a billion parameters take 15 on two cores
PLAN_SECONDS = 90
GIB = 2**30


class BenchmarkConfig(Config):
    """How long to measure, and where the result goes besides the screen."""

    steps: int = Field(default=10, ge=1)
    """Steps that are timed, each waited for."""
    warmup: int = Field(default=3, ge=0)
    """Steps before them."""
    output: str | None = None
    """A .json file, or a folder that gets <date>-<device>-<name>.json (none: only printed)."""


class TrainBenchmark(Configuration):
    """A run's configuration and what to measure of it."""

    benchmark: BenchmarkConfig = BenchmarkConfig()
    """What is measured."""


def main(argv: list[str]) -> int:
    """Measures what the command line asks, prints the JSON and writes it if asked to."""
    purpose = "Measure the train step on random tokens: time, tokens/s, MFU, memory."
    config = configure(TrainBenchmark, argv, program="python -m benchmarks.train", purpose=purpose)
    if config is None:
        return 0
    start_runtime(config.runtime, devices=config.devices, split=config.mesh.split)
    name = next((Path(word).stem for word in argv if word.endswith((".yaml", ".yml"))), "default")
    output, kind = config.benchmark.output, jax.devices()[0].device_kind
    path = record.destination(output, name, kind) if output else None
    # while the step is traced and compiled
    planning = start_plan(config, kind, jax.device_count()) if jax.process_index() == 0 else None
    with planning or contextlib.nullcontext():
        result = measure(config, name, planning)
    if jax.process_index() == 0:
        print(json.dumps(result, indent=1))
        if path is not None:
            record.write(path, result)
    return 130 if result.get("incomplete") else 0


def measure(config: TrainBenchmark, name: str, planning: "Planning | None" = None) -> dict[str, Any]:
    """Compiles the configuration's step, runs it, and reports; seconds of a step include waiting for its end.

    What the plan says is printed before the first step. After Ctrl-C, what the steps before it took, as `incomplete`;
    `UserError` if none was timed.
    """
    devices = jax.devices()
    session = make_session(config, devices)
    run = session.config
    with session.use():
        state, batch = session.initial_state(), random_batch(session)
        start = time.perf_counter()
        lowered = session.lower_step(state, batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
        compiled_at = time.perf_counter()
        planned = planning.result() if planning else None
        if planned is not None:
            print(f"compiled in {compiled_at - start:.1f} s; {plan_line(planned)}", file=sys.stderr, flush=True)
        seconds, loss = time_steps(compiled, state, batch, config.benchmark)
    tokens = run.train.global_batch * run.data.sequence_length
    kind = devices[0].device_kind
    return {
        "benchmark": "train",
        "name": name,
        **record.circumstances(devices[0].platform, kind, len(devices)),
        "runtime": devices[0].client.platform_version.splitlines(),
        "mesh": session.sizes,
        "precision": run.train.precision,
        "attention": attention_lines(session.attention),
        "recompute": run.model.recompute,
        "microbatches": run.train.microbatches,
        "parameters": session.blueprint.num_parameters,
        "sequence_length": run.data.sequence_length,
        "tokens_per_step": tokens,
        "trace_seconds": round(traced - start, 3),
        "compile_seconds": round(compiled_at - traced, 3),
        "loss_after": loss,
        **speed(seconds, tokens, model_flops_per_token(run.model, run.data.sequence_length)),
        **memory_use(compiled),
        "plan": planned,
        **({"incomplete": True} if len(seconds) < config.benchmark.steps else {}),
    }


def random_batch(session: RunSession) -> TokenBatch:
    """A global batch of the configuration's shape; every target weighs 1."""
    config, batches = session.config, session.batches
    size, length = config.train.global_batch, config.data.sequence_length
    rows = batches.local_rows(size)
    generator = np.random.default_rng(config.seed)
    tokens = generator.integers(config.model.vocab_size, size=(size, length + 1), dtype=np.int32)[rows]
    weights = np.ones((len(rows), length), np.float32)
    return batches.globalize(LocalBatch(0, size, size, rows, TokenBatch(tokens[:, :-1], tokens[:, 1:], weights)))


def time_steps(
    compiled: jax.stages.Compiled, state: TrainState, batch: TokenBatch, config: BenchmarkConfig
) -> tuple[list[float], float]:
    """Seconds of each timed step, and the last loss; fewer steps after a first Ctrl-C."""
    seconds: list[float] = []
    with finish_first("interrupted: reporting the steps so far; press Ctrl-C again to end at once") as request:
        for number in range(config.warmup + config.steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch))
            if number >= config.warmup:
                seconds.append(time.perf_counter() - start)
            if request.is_made:
                break
    if not seconds:
        raise UserError("interrupted before a step was timed")
    return seconds, float(metrics["loss"])


def speed(seconds: list[float], tokens: int, flops_per_token: float) -> dict[str, Any]:
    """Step milliseconds, and from their median tokens/s, model FLOP/s and MFU (None where the peak is not known)."""
    device = jax.devices()[0]
    median = float(np.median(seconds))
    peak = peak_flops(device.device_kind)
    rate = tokens / median * flops_per_token
    return {
        "step_milliseconds": {
            "median": round(1e3 * median, 3),
            "min": round(1e3 * min(seconds), 3),
            "p90": round(1e3 * float(np.percentile(seconds, 90)), 3),
            "steps": len(seconds),
        },
        "tokens_per_second": round(tokens / median, 1),
        "model_flops_per_second": rate,
        "peak_flops_per_device": peak,
        "mfu": None if peak is None else round(rate / (peak * jax.device_count()), 4),
    }


def memory_use(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Bytes: what the compiler planned for a device, and the most that the allocator (on a CPU, the process) held."""
    planned = memory(compiled)
    result = {"predicted_peak_bytes": planned.peak, "predicted_temporary_bytes": planned.temporaries}
    if jax.devices()[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return {**result, "process_max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return {**result, "device_peak_bytes": max(known) if known else None}


class Planning:
    """`jaxtron.plan` at work on a run, in a process of its own without any GPU, as it runs before there are any.

    Used as a context, which leaves neither process nor files behind.
    """

    def __init__(self, settings: str, gpu: str, count: int) -> None:
        self.gpu = gpu
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name) / "plan.json"
        file = Path(self._folder.name) / "run.yaml"
        file.write_text(settings, encoding="utf-8")
        words = [str(file), "--gpu", gpu, "--gpus", str(count), "--json", str(self._output)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": ""}
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        command = [sys.executable, "-m", "jaxtron.plan", *words]
        self._process = subprocess.Popen(command, cwd=record.ROOT, env=environment, text=True, **pipes)
        self._end = time.monotonic() + patience()

    def __enter__(self) -> "Planning":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def result(self) -> dict[str, Any]:
        """What the plan says, or an `error`; waits for it, not for ever.

        `program_bytes` compares with the allocator's peak; `total_bytes` has the reserve for libraries and
        communication too.
        """
        try:
            _, stderr = self._process.communicate(timeout=max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return {"error": f"it took more than {patience():g} s"}
        if self._process.returncode:
            return {"error": (stderr.strip().splitlines() or ["it failed"])[-1][:300]}
        made = json.loads(self._output.read_text(encoding="utf-8"))
        memory, prediction = made["memory"], made["prediction"]
        return {
            "gpu": self.gpu,
            "program_bytes": memory["total"] - memory["communication"] - memory["reserve"],
            "total_bytes": memory["total"],
            "fits": memory["fits"],
            "step_milliseconds": round(1e3 * prediction["step_seconds"], 3),
            "mfu": round(prediction["mfu"], 4),
            "attention": made["attention"],
        }


def patience(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds that a plan may take; of a section of `benchmarks.gpu` no more than half."""
    section = environment.get(SECTION_SECONDS)
    return PLAN_SECONDS if section is None else min(PLAN_SECONDS, 0.5 * float(section))


def start_plan(config: Configuration, kind: str, count: int) -> Planning | None:
    """The plan of this run on so many GPUs of this kind; None for a kind that it does not know."""
    gpu = next((gpu.name for gpu in GPUS.values() if gpu.device_kind == kind), None)
    if gpu is None:
        return None
    plain: dict[str, Any] = {name: getattr(config, name) for name in Configuration.model_fields} | {"devices": None}
    return Planning(dump(Configuration(**plain)), gpu, count)


def plan_line(planned: Mapping[str, Any]) -> str:
    """What is expected of the steps, before they are run."""
    if "error" in planned:
        return f"there is no plan: {planned['error']}"
    step, mfu, memory = planned["step_milliseconds"], 100 * planned["mfu"], planned["program_bytes"] / GIB
    return f"planned for {planned['gpu']}: {step:,.0f} ms a step, MFU {mfu:.1f} %, {memory:.1f} GiB of the program"


if __name__ == "__main__":
    sys.exit(run_command(main))

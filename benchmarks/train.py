"""`python -m benchmarks.train CONFIG.yaml [--setting value ...]`: the real train step on random tokens, as JSON."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import Field

from benchmarks import record
from jaxtron.command import configure, run_command
from jaxtron.config import Config, dump
from jaxtron.data.batch import TokenBatch
from jaxtron.data.loader import LocalBatch
from jaxtron.gpus import GPUS, peak_flops
from jaxtron.models.decoder.cost import model_flops_per_token
from jaxtron.plan.compiled.deviceless import memory
from jaxtron.run.attention import attention_lines
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import Session, make_session
from jaxtron.run.state import TrainState
from jaxtron.runtime.start import start_runtime

# seconds after which a plan is given up: a billion parameters take 15 on two cores
PLAN_SECONDS = 90


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
    start_runtime(config.runtime, devices=config.devices)
    name = next((Path(word).stem for word in argv if word.endswith((".yaml", ".yml"))), "default")
    output = config.benchmark.output
    path = record.destination(output, name, jax.devices()[0].device_kind) if output else None
    result = measure(config, name)
    if jax.process_index() == 0:
        result["plan"] = plan(config, result["device"], result["device_count"])
        print(json.dumps(result, indent=1))
        if path is not None:
            record.write(path, result)
    return 0


def measure(config: TrainBenchmark, name: str) -> dict[str, Any]:
    """Compiles the configuration's step, runs it, and reports; seconds of a step include waiting for its end."""
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
    }


def random_batch(session: Session) -> TokenBatch:
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
    """Seconds of each timed step, and the last loss."""
    seconds: list[float] = []
    for _ in range(config.warmup + config.steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - start)
    return seconds[config.warmup :], float(metrics["loss"])


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


def plan(config: Configuration, kind: str, count: int) -> dict[str, Any] | None:
    """What `jaxtron.plan` says of this run on so many GPUs of this kind; None for a kind that it does not know.

    In a process of its own without any GPU, as it runs before there are any. `program_bytes` compares with the
    allocator's peak; `total_bytes` has the reserve for libraries and communication too.
    """
    gpu = next((gpu.name for gpu in GPUS.values() if gpu.device_kind == kind), None)
    if gpu is None:
        return None
    plain: dict[str, Any] = {name: getattr(config, name) for name in Configuration.model_fields} | {"devices": None}
    with tempfile.TemporaryDirectory() as folder:
        settings, output = Path(folder) / "run.yaml", Path(folder) / "plan.json"
        settings.write_text(dump(Configuration(**plain)), encoding="utf-8")
        words = [str(settings), "--gpu", gpu, "--gpus", str(count), "--json", str(output)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": ""}
        options: Any = {"cwd": record.ROOT, "env": environment, "capture_output": True, "text": True}
        try:
            done = subprocess.run([sys.executable, "-m", "jaxtron.plan", *words], timeout=PLAN_SECONDS, **options)
        except subprocess.TimeoutExpired:
            return {"error": f"it took more than {PLAN_SECONDS} s"}
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["it failed"])[-1][:300]}
        made = json.loads(output.read_text(encoding="utf-8"))
    memory, prediction = made["memory"], made["prediction"]
    return {
        "gpu": gpu,
        "program_bytes": memory["total"] - memory["communication"] - memory["reserve"],
        "total_bytes": memory["total"],
        "fits": memory["fits"],
        "step_milliseconds": round(1e3 * prediction["step_seconds"], 3),
        "mfu": round(prediction["mfu"], 4),
        "attention": made["attention"],
    }


if __name__ == "__main__":
    sys.exit(run_command(main))

"""`python -m benchmarks.accumulation CONFIG.yaml [...]`: what the pipeline's executor costs where there is no pipeline.

Loss and gradients of one step, by the executor on one stage, and by a plain scan over the microbatches that
differentiates the whole loss and adds the gradients up in float32; run in turns, so that the machine is the same.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from benchmarks import record
from benchmarks.train import TrainBenchmark, random_batch
from jaxtron.command import configure, run_command
from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.models.program import Microbatch
from jaxtron.pipeline.model import Parameters
from jaxtron.run.session import make_session
from jaxtron.run.step import Trainer, batch_spec, counts, weigh
from jaxtron.runtime.start import start_runtime
from jaxtron.sharding.collectives import all_reduce
from jaxtron.sharding.parameters import manual_specs, reduce_gradients
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, PyTree


def main(argv: list[str]) -> int:
    """Measures what the command line asks, prints the JSON and writes it if asked to."""
    purpose = "Measure the executor on one stage against a plain scan over microbatches."
    config = configure(TrainBenchmark, argv, program="python -m benchmarks.accumulation", purpose=purpose)
    if config is None:
        return 0
    start_runtime(config.runtime, devices=config.devices, split=config.mesh.split)
    name = next((Path(word).stem for word in argv if word.endswith((".yaml", ".yml"))), "default")
    result = {"benchmark": "accumulation", "name": name, **measure(config)}
    print(json.dumps(result, indent=1))
    if config.benchmark.output:
        path = record.destination(config.benchmark.output, f"accumulation-{name}", jax.devices()[0].device_kind)
        record.write(path, result)
    return 0


def measure(config: TrainBenchmark) -> dict[str, Any]:
    """Median milliseconds of both, and their ratio step by step."""
    run = config.resolved()
    if run.mesh.pipe != 1:
        raise UserError(f"this benchmark is of one stage, not mesh.pipe {run.mesh.pipe}")
    devices = jax.devices()
    session = make_session(run, devices)
    with session.use():
        trainer = session.trainer
        params, batch = session.initial_state().model, random_batch(session)
        one = jnp.float32(1.0)
        executor = jax.jit(lambda params, batch: trainer.loss_and_gradients(params, batch, jnp.int32(0), one))
        programs = (executor, jax.jit(lambda params, batch: plain(trainer, params, batch)))
        results = [program(params, batch) for program in programs]
        seconds = [times(lambda p=program: p(params, batch), config.benchmark.warmup) for program in programs]
        seconds = [[], []]
        for _ in range(config.benchmark.steps):
            for kept, program in zip(seconds, programs, strict=True):
                kept += times(lambda p=program: p(params, batch), 1)
    ratios = np.array(seconds[0]) / np.array(seconds[1])
    return {
        **record.circumstances(devices[0].platform, devices[0].device_kind, len(devices)),
        "microbatches": run.train.microbatches,
        "losses": [float(results[0][0]["loss"]), float(results[1][0])],
        "executor_milliseconds": round(1e3 * float(np.median(seconds[0])), 3),
        "plain_scan_milliseconds": round(1e3 * float(np.median(seconds[1])), 3),
        "ratio_of_pairs": {
            "median": round(float(np.median(ratios)), 4),
            "p25": round(float(np.percentile(ratios, 25)), 4),
            "p75": round(float(np.percentile(ratios, 75)), 4),
        },
    }


def plain(trainer: Trainer, params: PyTree, batch: TokenBatch) -> tuple[Array, PyTree]:
    """Loss and float32 gradients by `jax.value_and_grad` in a scan over microbatches, without dropout."""

    def local(params: PyTree, batch: TokenBatch) -> tuple[Array, PyTree]:
        working, model = trainer.working(params), trainer.program.model(trainer.parts, None)
        microbatches = trainer.microbatches(weigh(batch, {name: 1 / total for name, total in counts(batch).items()}))

        def loss(working: Parameters, microbatch: Microbatch) -> tuple[Array, dict[str, Array]]:
            (stack,), (layers,) = model.stacks, working.stacks
            shared, numbers = stack.shared(microbatch), jnp.arange(trainer.stages.partitions[0].num_layers)

            def layer(x: Array, step: tuple[Array, PyTree]) -> tuple[Array, None]:
                number, weights = step
                return stack.layer(weights, x, number, shared).stream, None

            x = stack.enter(working.outer, None, microbatch)
            x = jax.lax.scan(layer, x, (numbers, layers), unroll=stack.unroll)[0]
            return model.head(working.outer, x, microbatch)

        def step(sums: Parameters, microbatch: Microbatch) -> tuple[Parameters, Array]:
            (_, told), gradients = jax.value_and_grad(loss, has_aux=True)(working, microbatch)
            return jax.tree.map(lambda total, one: total + one.astype(jnp.float32), sums, gradients), told["loss"]

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), working)
        gradients, nll = jax.lax.scan(step, zeros, microbatches)
        reduced = reduce_gradients(trainer.parts.join(gradients), trainer.blueprint.parameters)
        return all_reduce(nll.sum(), current().manual), reduced

    specs = manual_specs(trainer.blueprint.parameters)
    return region(local, (specs, batch_spec()), (PartitionSpec(), specs))(params, batch)


def times(run: Callable[[], Any], count: int) -> list[float]:
    """Seconds of so many runs, each waited for."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    sys.exit(run_command(main))

"""`python -m benchmarks.expert_speed CONFIG.yaml`: steps of a mixture beside those of a dense model, as JSON.

The dense model has one MLP in the place of each mixture, as wide as a token's experts and the shared one together, so
that both have the same FLOPs a token. Both are trained on the same batches of the run's own text, a step of one after a
step of the other, so that whatever else the machine does meets both.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import record
from benchmarks.train import TrainBenchmark
from jaxtron.command import configure, run_command
from jaxtron.config import UserError
from jaxtron.data.dataset import open_data
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.cost import model_flops_per_token
from jaxtron.models.decoder.kinds import MLP, MOE
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from jaxtron.runtime.start import start_runtime


def main(argv: list[str]) -> int:
    """Measures what the command line asks, prints the JSON and writes it if asked to."""
    purpose = "Measure the steps of a mixture of experts beside those of a dense model of the same FLOPs a token."
    config = configure(TrainBenchmark, argv, program="python -m benchmarks.expert_speed", purpose=purpose)
    if config is None:
        return 0
    start_runtime(config.runtime, devices=config.devices, split=config.mesh.split)
    name = next((Path(word).stem for word in argv if word.endswith((".yaml", ".yml"))), "default")
    result = {"benchmark": "expert_speed", "name": name, **measure(config)}
    print(json.dumps(result, indent=1))
    if config.benchmark.output:
        path = record.destination(config.benchmark.output, f"expert-speed-{name}", jax.devices()[0].device_kind)
        record.write(path, result)
    return 0


def measure(config: TrainBenchmark) -> dict[str, Any]:
    """Median tokens a second of both, and their ratio step by step."""
    devices, run = jax.devices(), config.resolved()
    model = run.model
    if not isinstance(model, ModelConfig) or MOE.symbol not in model.pattern:
        raise UserError(f"this benchmark is of a mixture, and model.pattern has no experts ({MOE.symbol})")
    dense = run.model_copy(update={"model": dense_model(model)})
    sides = {"mixture": make_session(run, devices), "dense": make_session(dense, devices)}
    seconds, losses = paired_steps(sides, config)
    taken = {name: np.array(times[config.benchmark.warmup :]) for name, times in seconds.items()}
    tokens = run.train.global_batch * run.data.sequence_length
    ratios = taken["dense"] / taken["mixture"]
    return {
        **record.circumstances(devices[0].platform, devices[0].device_kind, len(devices)),
        "mesh": sides["mixture"].sizes,
        "tokens_per_step": tokens,
        "steps": config.benchmark.steps,
        "warmup": config.benchmark.warmup,
        "parameters": {name: side.blueprint.num_parameters for name, side in sides.items()},
        "flops_per_token": {
            name: model_flops_per_token(side.config.model, run.data.sequence_length) for name, side in sides.items()
        },
        "losses_after": losses,
        "tokens_per_second": {name: round(tokens / float(np.median(times)), 1) for name, times in taken.items()},
        "mixture_of_dense": {
            "median": round(float(np.median(ratios)), 4),
            "p25": round(float(np.percentile(ratios, 25)), 4),
            "p75": round(float(np.percentile(ratios, 75)), 4),
        },
    }


def dense_model(model: ModelConfig) -> ModelConfig:
    """The model with an MLP in the place of each mixture, as wide as all that a token goes through."""
    moe = model.moe
    width = moe.top_k * (moe.expert_size or model.mlp_width) + moe.shared_size
    settings = model.model_dump(exclude={"moe"})
    settings |= {"pattern": model.pattern.replace(MOE.symbol, MLP.symbol), "mlp_size": width}
    return ModelConfig.model_validate(settings)


def paired_steps(
    sides: dict[str, RunSession], config: TrainBenchmark
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step of each side, by turns on the same batches, and the last losses."""
    run: Configuration = next(iter(sides.values())).config
    data = open_data(run.data, seed=run.seed, train_samples=run.train_samples())
    batches = next(iter(sides.values())).batches
    states = {name: side.initial_state() for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    with data.train_loader(batch_size=lambda _: run.train.global_batch, local_rows=batches.local_rows) as loader:
        for _ in range(config.benchmark.warmup + config.benchmark.steps):
            batch = jax.block_until_ready(batches.globalize(next(loader)))
            for name, side in sides.items():
                start = time.perf_counter()
                states[name], metrics = jax.block_until_ready(side.step(states[name], batch))
                seconds[name].append(time.perf_counter() - start)
                losses[name] = float(metrics["loss"])
    return seconds, losses


if __name__ == "__main__":
    sys.exit(run_command(main))

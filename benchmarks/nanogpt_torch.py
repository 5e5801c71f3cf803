"""`python -m benchmarks.nanogpt_torch CONFIG.yaml --benchmark.torch PYTHON`: our step beside plain PyTorch's, as JSON.

The same small GPT, from the same parameters on the same batch, in two processes on the same cores that take turns:
some steps of ours, as many of PyTorch's. Ratios are of neighbouring turns, so that whatever else the machine does meets
both; processor time is what it counts of each process, whatever ran beside it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import Field

from benchmarks import record
from benchmarks.train import random_batch
from benchmarks.turns import OtherProcess, take_cores, take_turns
from jaxtron.command import configure, run_command
from jaxtron.config import Config, UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from jaxtron.run.state import TrainState
from jaxtron.runtime.start import start_runtime

OTHER = record.ROOT / "benchmarks" / "plain_gpt.py"
NEEDS = "PyTorch and NumPy"


class TurnsConfig(Config):
    """Who is measured beside us, and how long."""

    torch: str = sys.executable
    """A Python that has PyTorch and NumPy."""
    threads: int = Field(default=1, ge=1)
    """Cores that both have, and threads of each."""
    pairs: int = Field(default=10, ge=1)
    """Turns of each."""
    steps: int = Field(default=20, ge=1)
    """Steps of a turn."""
    output: str | None = None
    """A .json file, or a folder that gets <date>-<device>-<name>.json (none: only printed)."""


class TurnsBenchmark(Configuration):
    """A run's configuration and what to measure of it."""

    benchmark: TurnsConfig = TurnsConfig()
    """What is measured."""


class Ours:
    """Our compiled step on one batch."""

    def __init__(self, session: RunSession) -> None:
        self.state, self._batch = session.initial_state(), random_batch(session)
        self._vocabulary = session.config.model.vocab_size
        self._step = session.lower_step(self.state, self._batch).compile()

    def take(self, steps: int) -> dict[str, float]:
        """As `Torch.take`."""
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics = self._step(self.state, self._batch)
        jax.block_until_ready(self.state)
        seconds, processor = time.perf_counter() - wall, time.process_time() - processor
        return {"seconds": seconds, "processor": processor, "loss": float(metrics["loss"])}

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters by PyTorch's names, and the batch."""
        found = {"." + name: np.asarray(getattr(self._batch, name)) for name in ("tokens", "targets")}
        return found | plain_weights(self.state, self._vocabulary)


def plain_weights(state: TrainState, vocabulary: int) -> dict[str, np.ndarray]:
    """The parameters as `plain_gpt.Gpt` has them: a layer each, matrices as [out, in], no padding of the vocabulary."""
    ours = {
        ".".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]
    }
    found = {
        "tokens.weight": ours["embedding.table"][:vocabulary],
        "positions.weight": ours["embedding.positions"],
        "norm.weight": ours["final_norm.scale"],
    }
    layers = "stack.periods.layers"
    heads = (ours[f"{layers}.0.attention.{name}.kernel"] for name in ("query", "key", "value"))
    qkv = np.concatenate([kernel.reshape(*kernel.shape[:2], -1) for kernel in heads], -1)
    matrices = {
        "qkv": qkv,
        "output": ours[f"{layers}.0.attention.output.kernel"].reshape(len(qkv), -1, qkv.shape[1]),
        "up": ours[f"{layers}.1.mlp.up.kernel"],
        "down": ours[f"{layers}.1.mlp.down.kernel"],
    }
    for layer in range(len(qkv)):
        for name, kernels in matrices.items():
            found[f"blocks.{layer}.{name}.weight"] = np.ascontiguousarray(kernels[layer].T)
        for place in (0, 1):
            found[f"blocks.{layer}.norm_{place + 1}.weight"] = ours[f"{layers}.{place}.norm.scale"][layer]
    return found


def main(argv: list[str]) -> int:
    """Measures what the command line asks, prints the JSON and writes it if asked to."""
    purpose = "Measure our train step on a CPU beside that of the same GPT in plain PyTorch."
    config = configure(TurnsBenchmark, argv, program="python -m benchmarks.nanogpt_torch", purpose=purpose)
    if config is None:
        return 0
    take_cores(config.benchmark.threads)
    start_runtime(config.runtime, devices=config.devices, split=config.mesh.split)
    name = next((Path(word).stem for word in argv if word.endswith((".yaml", ".yml"))), "default")
    result = {"benchmark": "nanogpt_torch", "name": name, **measure(config)}
    print(json.dumps(result, indent=1))
    if config.benchmark.output:
        path = record.destination(config.benchmark.output, f"nanogpt-torch-{name}", jax.devices()[0].device_kind)
        record.write(path, result)
    return 0


def measure(config: TurnsBenchmark) -> dict[str, Any]:
    """Turns of both, and ratios of theirs to ours: above 1 ours is the faster one."""
    turns, devices = config.benchmark, jax.devices()[:1]
    session = make_session(config, devices)
    recipe = plain_recipe(session.config, turns.threads)
    with session.use(), tempfile.TemporaryDirectory() as folder:
        ours = Ours(session)
        arrays = ours.arrays()
        (Path(folder) / "recipe.json").write_text(json.dumps(recipe))
        np.savez(Path(folder) / "arrays.npz", **arrays)
        words = [str(Path(folder) / name) for name in ("recipe.json", "arrays.npz")]
        with OtherProcess(turns.torch, OTHER, words, turns.threads, needs=NEEDS) as torch:
            sides = {"jaxtron": ours, "torch": torch}
            # of as many steps, to be compared
            first = {name: side.take(turns.steps)["loss"] for name, side in sides.items()}
            turned = take_turns(sides, turns.steps, turns.pairs)
            versions = torch.versions
    return {
        **record.circumstances(devices[0].platform, devices[0].device_kind, len(devices)),
        "torch": versions,
        "recipe": recipe,
        "pairs": turns.pairs,
        "steps_of_a_turn": turns.steps,
        "load_average": turned.load_average(),
        "losses_after_first_turn": first,
        "step_milliseconds": turned.milliseconds("seconds", turns.steps),
        "processor_milliseconds": turned.milliseconds("processor", turns.steps),
        "torch_of_jaxtron": {name: turned.ratios("torch", "jaxtron", name) for name in ("seconds", "processor")},
    }


def plain_recipe(config: Configuration, threads: int) -> dict[str, Any]:
    """What `plain_gpt` needs to know; `UserError` where the model is another than nanoGPT's."""
    model, optimizer, train = config.model, config.optimizer, config.train
    if not isinstance(model, ModelConfig):
        raise UserError("this benchmark is of a decoder")
    asked = {
        "model.pattern": (model.pattern, "*-"),
        "model.position": (model.position, "learned"),
        "model.norm": (model.norm, "layer_norm"),
        "model.activation": (model.activation, "gelu"),
        "model.bias": (model.bias, False),
        "model.tied_head": (model.tied_head, True),
        "model.num_kv_heads": (model.kv_heads, model.num_heads),
        "model.dropout": (model.dropout, model.attention_dropout),
        "train.microbatches": (train.microbatches, 1),
        "train.precision": (train.precision, "fp32"),
        "optimizer.name": (optimizer.name, "adamw"),
        "optimizer.schedule": (optimizer.schedule, "constant"),
        "optimizer.warmup_steps": (optimizer.warmup_steps, 0),
    }
    for name, (value, wanted) in asked.items():
        if value != wanted:
            raise UserError(f"{name} {value} is not nanoGPT's, which PyTorch has here; set --{name} {wanted}")
    return {
        "layers": model.num_layers,
        "width": model.hidden_size,
        "heads": model.num_heads,
        "vocabulary": model.vocab_size,
        "length": config.data.sequence_length,
        "dropout": model.dropout,
        "rows": train.global_batch,
        "threads": threads,
        **{name: getattr(optimizer, name) for name in ("learning_rate", "beta1", "beta2", "epsilon")},
        **{name: getattr(optimizer, name) for name in ("weight_decay", "clip_norm")},
    }


if __name__ == "__main__":
    sys.exit(run_command(main))

"""`python -m benchmarks.decoding`: a token after contexts of several lengths, attention alone beside a hybrid, as JSON.

Both have as many layers, of the widths of one configuration: the hybrid by the ratios of the published one. A token of
one after a token of the other, so that whatever else the machine does meets both. Memories are filled with random
numbers: a step takes as long whatever it remembers. Further flags are settings of both models.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from benchmarks import record
from jaxtron.command import run_command
from jaxtron.config import load
from jaxtron.models.decoder.cost import num_parameters
from jaxtron.models.decoder.decode import Steps
from jaxtron.models.growing import SequenceMemory
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from jaxtron.runtime.start import start_runtime
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, PyTree

CONFIG = record.ROOT / "configs" / "gpt_tiny.yaml"
SIZES = (
    *("--model.hidden_size", 256, "--model.num_heads", 4, "--model.mlp_size", 1024, "--model.position", "none"),
    *("--model.norm", "rms_norm", "--model.bias", "false", "--mesh.data", 1),
)
MAMBA = ("--model.mamba.head_dim", 64, "--model.mamba.num_groups", 1, "--model.mamba.state_size", 64)
# 8% attention and 50% MLPs, as of the published hybrid, of as many layers
MODELS: dict[str, tuple[object, ...]] = {
    "attention": ("--model.pattern", "*-", "--model.num_layers", 12),
    "hybrid": ("--model.hybrid", 0.08, 0.5, 24, "--model.num_layers", 1, *MAMBA),
}


def main(argv: list[str]) -> int:
    """Measures what is asked for, prints the JSON and writes it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 16384, 65536], help="of contexts")
    parser.add_argument("--rows", type=int, default=1, help="sequences at once")
    parser.add_argument("--steps", type=int, default=30, help="tokens that are timed at each length")
    parser.add_argument("--output", help="a .json file, or a folder that gets <date>-<device>-decoding.json")
    options, flags = parser.parse_known_args(argv)
    found = {name: load(Configuration, CONFIG, list(map(str, (*SIZES, *of, *flags)))) for name, of in MODELS.items()}
    configs = {name: config.resolved() for name, config in found.items()}
    start_runtime(configs["hybrid"].runtime, devices=1)
    device = jax.devices()[0]
    result = {
        "benchmark": "decoding",
        "name": "decoding",
        **record.circumstances(device.platform, device.device_kind, 1),
        "flags": flags,
        "rows": options.rows,
        "steps": options.steps,
        "patterns": {name: config.model.pattern for name, config in configs.items()},
        "parameters": {name: num_parameters(config.model, 1) for name, config in configs.items()},
        "lengths": {length: measure(configs, options.rows, length, options.steps) for length in options.lengths},
    }
    print(json.dumps(result, indent=1))
    if options.output:
        record.write(record.destination(options.output, "decoding", device.device_kind), result)
    return 0


def measure(configs: dict[str, Configuration], rows: int, length: int, steps: int) -> dict[str, Any]:
    """Median milliseconds of a token of each model after so many, bytes that it remembers, and their ratio by turns."""
    sides = {name: side(config, rows, length, steps + 2) for name, config in configs.items()}
    states = {name: (memory, jnp.zeros((rows, 1), jnp.int32)) for name, (_, memory) in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(steps + 2):
        for name, (step, _) in sides.items():
            memory, token = states[name]
            start = time.perf_counter()
            token, memory = jax.block_until_ready(step(memory, token))
            seconds[name].append(time.perf_counter() - start)
            states[name] = memory, token
    # the first two compile and warm up
    taken = {name: np.array(times[2:]) for name, times in seconds.items()}
    ratios = taken["attention"] / taken["hybrid"]
    return {
        "milliseconds": {name: round(float(np.median(times)) * 1e3, 3) for name, times in taken.items()},
        "memory_bytes": {name: sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for name, (one, _) in states.items()},
        "hybrid_of_attention": {
            "median": round(float(np.median(ratios)), 3),
            "p25": round(float(np.percentile(ratios, 25)), 3),
            "p75": round(float(np.percentile(ratios, 75)), 3),
        },
    }


def side(
    config: Configuration, rows: int, length: int, more: int
) -> tuple[Callable[[SequenceMemory, Array], tuple[Array, SequenceMemory]], SequenceMemory]:
    """A model's step, which takes the likeliest token, and what it remembers of so many positions, with room for more.

    Memory that a step is given is gone after it.
    """
    session = make_session(config, jax.devices()[:1])
    with session.use():
        specs, split = manual_specs(session.blueprint.parameters), PartitionSpec(current().manual)

        def make(params: PyTree) -> Steps:
            module = session.blueprint.module(session.blueprint.working(params, jnp.float32))
            return Steps(module, session.trainer.stages.partitions[0])

        def local(model: Steps, memory: SequenceMemory, token: Array) -> tuple[Array, SequenceMemory]:
            logits, memory = model.advance(token, memory)
            return jnp.argmax(logits, -1, keepdims=True).astype(jnp.int32), memory

        def start(model: Steps, tokens: Array) -> SequenceMemory:
            return model.advance(tokens, model.start(rows, length + more), begins=True)[1]

        model = jax.jit(region(make, (specs,), split))(session.initial_state().params)
        step = jax.jit(region(local, (split, split, split), (split, split)), donate_argnums=1)
        memory = jax.jit(region(start, (split, split), split))(model, jnp.zeros((rows, 2), jnp.int32))
        filled = [
            jax.device_put(jax.random.normal(jax.random.key(number), leaf.shape, leaf.dtype), leaf.sharding)
            for number, leaf in enumerate(jax.tree.leaves(memory.layers))
        ]
        layers = jax.tree.unflatten(jax.tree.structure(memory.layers), filled)
        lengths = jax.device_put(jnp.full(rows, length, jnp.int32), memory.lengths.sharding)
        memory = SequenceMemory(layers, lengths, memory.room)

    def run(memory: SequenceMemory, token: Array) -> tuple[Array, SequenceMemory]:
        with session.use():
            return step(model, memory, token)

    return run, memory


if __name__ == "__main__":
    sys.exit(run_command(main))

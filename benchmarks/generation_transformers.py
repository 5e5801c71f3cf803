"""`python -m benchmarks.generation_transformers --benchmark.torch PYTHON`: text by ours beside transformers', as JSON.

One small Llama with random weights, which transformers writes and `generate`'s engine reads; the same prompts, the most
likely tokens, float32, a cache of keys and values on both sides. Two processes on the same cores take turns.
"""

import contextlib
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
from benchmarks.turns import OtherProcess, take_cores, take_turns
from jaxtron.command import configure, run_command
from jaxtron.config import Config
from jaxtron.generate.opening import SpeakingModel, open_model
from jaxtron.generate.source import ModelSource, read_model
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.start import start_runtime

OTHER = record.ROOT / "benchmarks" / "plain_generation.py"
NEEDS = "PyTorch and transformers"


class SpeedConfig(Config):
    """The model, what it is asked for, and how long."""

    torch: str = sys.executable
    """A Python that has PyTorch and transformers."""
    threads: int = Field(default=1, ge=1)
    """Cores that both have, and threads of each."""
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=512, ge=64, multiple_of=64)
    """Of the residual stream; heads are 64 wide, half as many have keys and values, the MLP is 3 times as wide."""
    vocabulary: int = Field(default=32000, ge=512)
    rows: int = Field(default=1, ge=1)
    """Prompts at a time."""
    prompt: int = Field(default=64, ge=1)
    """Tokens of each prompt."""
    tokens: int = Field(default=64, ge=1)
    """Tokens that are made after each."""
    pairs: int = Field(default=10, ge=1)
    """Turns of each side."""
    output: str | None = None
    """A .json file, or a folder that gets <date>-<device>-<name>.json (none: only printed)."""


class SpeedBenchmark(Config):
    """What is measured."""

    benchmark: SpeedConfig = SpeedConfig()


class EngineSide:
    """Our engine, which reads the prompts and makes tokens until each has enough."""

    def __init__(self, model: SpeakingModel, prompts: np.ndarray) -> None:
        self._model, self._prompts = model, prompts
        self._settings = model.settings(temperature=0.0, seed=0, ignore_eos=True)

    def take(self, count: int) -> dict[str, Any]:
        """As `OtherProcess.take`."""
        engine = self._model.engine
        wall, processor = time.perf_counter(), time.process_time()
        for row, prompt in enumerate(self._prompts):
            engine.begin(row, prompt, self._settings)
        steps = [[one.token for one in engine.step()] for _ in range(count)]
        seconds, processor = time.perf_counter() - wall, time.process_time() - processor
        for row in range(len(self._prompts)):
            engine.end(row)
        return {"seconds": seconds, "processor": processor, "tokens": np.transpose(steps).tolist()}


def llama(speed: SpeedConfig) -> dict[str, Any]:
    """The model by transformers' names."""
    heads = speed.width // 64
    return {
        "vocab_size": speed.vocabulary,
        "hidden_size": speed.width,
        "intermediate_size": 3 * speed.width,
        "num_hidden_layers": speed.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": speed.prompt + speed.tokens,
    }


def measure(speed: SpeedConfig) -> dict[str, Any]:
    """Turns of both, and ratios of theirs to ours: above 1 ours is the faster one."""
    random = np.random.default_rng(0)
    prompts = random.integers(1, speed.vocabulary, (speed.rows, speed.prompt), np.int32)
    settings = {"model": llama(speed), "prompts": prompts.tolist(), "threads": speed.threads}
    with tempfile.TemporaryDirectory() as folder:
        words = [folder, json.dumps(settings)]
        with OtherProcess(speed.torch, OTHER, words, speed.threads, needs=NEEDS) as theirs:
            source = ModelSource(Path(folder), ("--data.tokenizer", "bytes", "--train.precision", "fp32"))
            # standard output is the JSON's
            with (
                contextlib.redirect_stdout(sys.stderr),
                open_model(source, read_model(source), rows=speed.rows) as model,
            ):
                sides = {"jaxtron": EngineSide(model, prompts), "transformers": theirs}
                # what is compiled is compiled here
                first = {name: side.take(speed.tokens)["tokens"] for name, side in sides.items()}
                turned = take_turns(sides, speed.tokens, speed.pairs)
            versions = theirs.versions
    devices = jax.devices()[:1]
    return {
        **record.circumstances(devices[0].platform, devices[0].device_kind, len(devices)),
        "torch": versions,
        "settings": speed.model_dump(exclude={"torch", "output"}),
        "load_average": turned.load_average(),
        "same_tokens": same_part(first["jaxtron"], first["transformers"]),
        "token_milliseconds": turned.milliseconds("seconds", speed.tokens),
        "processor_milliseconds": turned.milliseconds("processor", speed.tokens),
        "transformers_of_jaxtron": {
            name: turned.ratios("transformers", "jaxtron", name) for name in ("seconds", "processor")
        },
    }


def same_part(first: list[list[int]], second: list[list[int]]) -> float:
    """Which part of the tokens is the same on both sides."""
    return float(np.mean(np.equal(first, second)))


def main(argv: list[str]) -> int:
    """Measures what the command line asks, prints the JSON and writes it if asked to."""
    purpose = "Measure how fast text is made on a CPU, beside Hugging Face transformers."
    program = "python -m benchmarks.generation_transformers"
    config = configure(SpeedBenchmark, argv, program=program, purpose=purpose)
    if config is None:
        return 0
    speed = config.benchmark
    take_cores(speed.threads)
    start_runtime(RuntimeConfig(), devices=1)
    result = {"benchmark": "generation_transformers", "name": f"rows-{speed.rows}", **measure(speed)}
    print(json.dumps(result, indent=1))
    if speed.output:
        name = f"generation-transformers-width-{speed.width}-rows-{speed.rows}-threads-{speed.threads}"
        record.write(record.destination(speed.output, name, jax.devices()[0].device_kind), result)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

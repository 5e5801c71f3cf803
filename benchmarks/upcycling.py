"""`python -m benchmarks.upcycling`: mixtures made of a small dense model beside more of the dense model, as JSON.

The dense model is trained by configs/gpt_tiny.yaml and converted by the command that a user has: to the mixtures, and
to one of a single expert, which is the dense model itself as a new run. All are then trained on by the same tokens,
with a new optimizer and the same schedule, and scored on the same held-out text. Further flags are training's, of every
run: --data.path for one.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import record
from jaxtron.command import check_output, run_command, write_whole
from jaxtron.config import UserError, load
from jaxtron.run.configuration import Configuration

CONFIG = record.ROOT / "configs" / "gpt_tiny.yaml"
SEED = 2
# the fastest on a CPU
BUCKETS = ("--model.moe.buckets", "device")
# the paper's activation, whose factor is shared evenly between an expert's matrices
BASE = ("--model.activation", "squared_relu", "--train.sample_tokens", 0, "--train.validation_batches", 48)


@dataclass(frozen=True)
class Continued:
    """One way in which training goes on: its name, and the flags of the conversion."""

    name: str
    flags: tuple[object, ...]


DENSE = Continued("dense", ("--experts", 1, "--scores", "topk_softmax"))
MIXTURES = (
    Continued("E8G1T2", ("--experts", 8, "--top_k", 2)),
    Continued("E8G8T8", ("--experts", 8, "--granularity", 8, "--top_k", 8)),
    Continued("E8G8T8 topk", ("--experts", 8, "--granularity", 8, "--top_k", 8, "--scores", "topk_softmax")),
)


def main(argv: list[str]) -> int:
    """Goes all the way, prints the JSON, and writes it and the picture if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upcycling", description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of the dense model")
    parser.add_argument("--further", type=int, default=400, help="of each run that goes on from it")
    parser.add_argument("--points", type=int, default=8, help="validations of each of them")
    parser.add_argument("--directory", type=Path, default=Path("runs/upcycling"), help="runs; must be new")
    parser.add_argument("--output", help="a .json file, or a folder that gets <date>-cpu-upcycling.json")
    parser.add_argument("--picture", type=Path, help="a .png file of the curves")
    options, flags = parser.parse_known_args(argv)
    path = record.destination(options.output, "upcycling", "cpu") if options.output else None
    if options.picture:
        check_output("--picture", options.picture)
    if options.directory.exists():
        raise UserError(f"--directory {options.directory} is there; remove it or give a new one")
    result = measure(options, flags)
    print(json.dumps(result, indent=1))
    if path is not None:
        record.write(path, result)
    if options.picture:
        write_whole(options.picture, drawn(result))
    return 0


def measure(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Losses on the held-out text by step: of the dense model, and of each run that goes on from it."""
    # before anything changes
    circumstances = record.circumstances("cpu", platform.machine(), os.cpu_count() or 1)
    folder = options.directory
    every = ("--train.validate_every", max(1, options.further // options.points))
    first = train(CONFIG, folder / "first", "--train.steps", options.steps, *BASE, *flags)
    runs = {}
    for way in (DENSE, *MIXTURES):
        # other tokens than the first run's, the same for all
        settings = (*BUCKETS, "--seed", SEED, "--train.steps", options.further, *every)
        output = folder / way.name.replace(" ", "_")
        jaxtron("convert", "upcycle", folder / "first", "--output", output, *way.flags, *settings)
        runs[way.name] = train(output / "config.yaml", output)
    last = {name: run["validation_losses"][options.further] for name, run in runs.items()}
    return {
        "benchmark": "upcycling",
        "name": "upcycling",
        **circumstances,
        "flags": flags,
        "tokens_per_step": tokens_per_step(folder / "first"),
        "first": first,
        "runs": runs,
        "below_dense": {way.name: round(1 - last[way.name] / last["dense"], 5) for way in MIXTURES},
    }


def tokens_per_step(directory: Path) -> int:
    """Of a run's training."""
    config = load(Configuration, directory / "config.yaml")
    return config.train.global_batch * config.data.sequence_length


def train(config: Path, directory: Path, *flags: object) -> dict[str, Any]:
    """A training, with what its metrics say."""
    start = time.perf_counter()
    jaxtron("train", config, "--run.directory", directory, *flags)
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {
        name: {line["step"]: round(line[name], 5) for line in lines if name in line}
        for name in ("loss", "validation_loss")
    }
    return {
        "seconds": round(seconds, 1),
        "losses": found["loss"],
        "validation_losses": found["validation_loss"],
    }


def drawn(result: dict[str, Any]) -> bytes:
    """A picture of the held-out losses by the tokens of the second training, as PNG."""
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, run in result["runs"].items():
        steps = list(run["validation_losses"])
        tokens = [step * result["tokens_per_step"] / 1e6 for step in steps]
        losses = list(run["validation_losses"].values())
        axes.plot(tokens, losses, marker="o", markersize=4, label=f"{name} ({losses[-1]:.4f})")
    begin = list(result["first"]["validation_losses"].values())[-1]
    axes.axhline(begin, color="gray", linestyle=":", label=f"the model before ({begin:.4f})")
    axes.set(xlabel="million tokens after the conversion", ylabel="held-out loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def jaxtron(*words: object) -> None:
    """A command of Jaxtron's in a process of its own, its output on the standard error; UserError where it fails."""
    done = subprocess.run([sys.executable, "-m", "jaxtron", *map(str, words)], stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"jaxtron {words[0]} ended with exit code {done.returncode}")


if __name__ == "__main__":
    sys.exit(run_command(main))

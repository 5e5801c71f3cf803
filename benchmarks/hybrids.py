"""`python -m benchmarks.hybrids`: attention alone, Mamba-2 alone and a hybrid, of one size, on the same data, as JSON.

All are trained by the command that a user has: on Python's own source, and on two tasks that ask for what stands
earlier in a text (benchmarks/recall.py). Of the text there is the held-out loss by step, of a task also how many of the
held-out answers are right, by how much there was to remember. A run that was cut short goes on. Further
flags are training's, of every run.
"""

import argparse
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import answers, recall, record
from jaxtron.command import check_output, run_command, write_whole
from jaxtron.config import UserError, load
from jaxtron.models.decoder.cost import num_parameters
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.start import start_runtime

CONFIG = record.ROOT / "configs" / "gpt_tiny.yaml"
TEXT = "text"
MAMBA = (
    *("--model.position", "none", "--model.mamba.state_size", 16, "--model.mamba.head_dim", 32),
    *("--model.mamba.num_groups", 1),
)
# three mixers and three MLPs each, of widths that make all models equal; the hybrid is by the rule of the published one
MODELS: dict[str, tuple[object, ...]] = {
    "attention": ("--model.pattern", "*-", "--model.num_layers", 3, "--model.mlp_size", 256),
    "Mamba-2": ("--model.pattern", "M-", "--model.num_layers", 3, "--model.mlp_size", 160, *MAMBA),
    "hybrid": ("--model.hybrid", 1 / 6, 1 / 2, 6, "--model.num_layers", 1, "--model.mlp_size", 192, *MAMBA),
}
COMMON = (
    *("--model.hidden_size", 64, "--model.num_heads", 2, "--model.norm", "rms_norm", "--model.initial_std", 0.1),
    *("--optimizer.weight_decay", 0.0, "--train.sample_tokens", 0, "--checkpoint.every", 10**6, "--devices", 1),
)
LENGTHS = {TEXT: 128, "copying": 64, "phonebook": 128}
STEPS = {TEXT: 200, "copying": 1200, "phonebook": 1000}
TOKENS_PER_STEP, VALIDATE_EVERY = 1024, 100


def main(argv: list[str]) -> int:
    """Trains and scores all that is asked for, prints the JSON, and writes it and the picture if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hybrids", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2], help="of weights and of data; the text has the first alone"
    )
    parser.add_argument("--steps", type=int, help=f"of {TOKENS_PER_STEP:,} tokens, of each run (none: {STEPS})")
    parser.add_argument("--held_out", type=int, default=100, help="examples of each size that are scored")
    parser.add_argument("--directory", type=Path, default=Path("runs/hybrids"), help="data and runs")
    parser.add_argument("--output", help="a .json file, or a folder that gets <date>-cpu-hybrids.json")
    parser.add_argument("--picture", type=Path, help="a .png file of the curves")
    options, flags = parser.parse_known_args(argv)
    path = record.destination(options.output, "hybrids", "cpu") if options.output else None
    if options.picture:
        check_output("--picture", options.picture)
    result = measure(options, flags)
    print(json.dumps(result, indent=1))
    if path is not None:
        record.write(path, result)
    if options.picture:
        write_whole(options.picture, drawn(result))
    return 0


def measure(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Held-out losses by step and right answers by size: by task, model and seed."""
    # before anything changes
    circumstances = record.circumstances("cpu", platform.machine(), os.cpu_count() or 1)
    # answers are scored in this process, on the CPU as all else
    start_runtime(RuntimeConfig(), devices=1)
    tasks: dict[str, Any] = {}
    # seed by seed, so that a run that is cut short has all models
    for seed in options.seeds:
        for task, model in itertools.product(options.tasks, MODELS):
            if task == TEXT and seed != options.seeds[0]:
                continue
            runs = tasks.setdefault(task, {}).setdefault(model, {})
            runs[seed] = one_run(task, model, seed, options, flags)
            print(task, model, seed, json.dumps(runs[seed]), file=sys.stderr, flush=True)
    return {
        "benchmark": "hybrids",
        "name": "hybrids",
        **circumstances,
        "flags": flags,
        "tokens_per_step": TOKENS_PER_STEP,
        "parameters": {model: parameters(model) for model in MODELS},
        "tasks": tasks,
    }


def one_run(task: str, model: str, seed: int, options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """A model trained on a task, and what is measured of it."""
    folder, steps = options.directory / f"{task}-{seed}", options.steps or STEPS[task]
    run = folder / model
    data, held_out = (), []
    if task != TEXT:
        rows = TOKENS_PER_STEP // LENGTHS[task] * steps
        data, held_out = recall.prepare(folder / "data", task, rows, options.held_out, seed)
    course = ("--seed", seed, "--train.steps", steps, "--train.validate_every", VALIDATE_EVERY)
    words = (*settings(task, model), *data, *course, *flags)
    found = train(run, words)
    if held_out:
        found["right"] = answers.score(run, held_out)
    return found


def settings(task: str, model: str) -> tuple[object, ...]:
    """Flags of a training."""
    length = LENGTHS[task]
    sizes = ("--data.sequence_length", length, "--train.global_batch", TOKENS_PER_STEP // length)
    return (*COMMON, *MODELS[model], *sizes)


def parameters(model: str) -> int:
    """How many a model has."""
    config = load(Configuration, CONFIG, [str(word) for word in settings(TEXT, model)]).resolved()
    return num_parameters(config.model, config.data.sequence_length)


def train(run: Path, flags: Sequence[object]) -> dict[str, Any]:
    """A training, with what its metrics say."""
    command = [sys.executable, "-m", "jaxtron", "train", CONFIG, "--run.directory", run, *flags]
    done = subprocess.run(list(map(str, command)), stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"the training of {run} ended with exit code {done.returncode}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: round(line["validation_loss"], 4) for line in lines if "validation_loss" in line}
    return {"validation_losses": losses}


def drawn(result: dict[str, Any]) -> bytes:
    """A picture as PNG: of the text losses by tokens, of each task answers by what there is to remember."""
    tasks = result["tasks"]
    figure = Figure(figsize=(5 * len(tasks), 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, models) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for number, (model, runs) in enumerate(models.items()):
            if task == TEXT:
                _draw_losses(axes, model, f"C{number}", list(runs.values()), result["tokens_per_step"])
            else:
                _draw_answers(axes, model, f"C{number}", list(runs.values()))
        axes.set_title(task)
        axes.grid(alpha=0.3)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_losses(axes: Axes, model: str, color: str, runs: list[dict[str, Any]], tokens_per_step: int) -> None:
    for number, run in enumerate(runs):
        tokens = [int(step) * tokens_per_step / 1e6 for step in run["validation_losses"]]
        losses = list(run["validation_losses"].values())
        label = f"{model} ({losses[-1]:.3f})" if number == 0 else None
        axes.plot(tokens, losses, color=color, marker="o", markersize=3, label=label)
    axes.set(xlabel="million tokens", ylabel="held-out loss (nats per byte)")


def _draw_answers(axes: Axes, model: str, color: str, runs: list[dict[str, Any]]) -> None:
    for number, run in enumerate(runs):
        sizes = [int(size) for size in run["right"]]
        for measure, style in (("whole", "-"), ("characters", ":")):
            shares = [found[measure] for found in run["right"].values()]
            label = model if (number, measure) == (0, "whole") else None
            axes.plot(sizes, shares, color=color, linestyle=style, marker="o", markersize=3, label=label)
    axes.set(xlabel="letters, or people", ylabel="right answers (dotted: characters)", ylim=(-0.02, 1.02))


if __name__ == "__main__":
    sys.exit(run_command(main))

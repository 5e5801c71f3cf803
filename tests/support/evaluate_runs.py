"""Runs of the train and evaluate commands in this process, for the tests beside it."""

import json
from dataclasses import dataclass
from pathlib import Path

from jaxtron.evaluate import __main__ as evaluate
from jaxtron.train import __main__ as training
from tests.support.commands import Ended, run_main

SMALL = (
    *("--model.num_layers", "2", "--model.hidden_size", "32", "--model.num_heads", "2"),
    *("--model.vocab_size", "32", "--model.vocab_multiple", "32"),
    *("--data.tokenizer", "characters", "--data.sequence_length", "32"),
    *("--optimizer.learning_rate", "1e-2", "--optimizer.warmup_steps", "0"),
    *("--train.global_batch", "16", "--train.precision", "fp32", "--train.sample_tokens", "0"),
    *("--train.steps", "4", "--train.validation_batches", "none", "--checkpoint.every", "2"),
)


@dataclass(frozen=True)
class TrainedRun:
    """Where a run is, its last line of metrics, and the text that it did not train on."""

    directory: Path
    metrics: dict
    held_out: Path


def train(folder: Path, text: str) -> TrainedRun:
    """A small run on all eight devices, two of them along `tensor`."""
    (folder / "text.txt").write_text(text)
    places = {"run.directory": "run", "data.path": "text.txt", "data.cache_directory": "tokens"}
    flags = [word for name, place in places.items() for word in (f"--{name}", str(folder / place))]
    ended = run_main(training.main, [*SMALL, "--mesh.tensor", "2", *flags])
    assert ended.code == 0, ended
    held_out = folder / "held_out.txt"
    held_out.write_text(text[int(len(text) * 0.9) :])
    metrics = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return TrainedRun(folder / "run", metrics, held_out)


def run(*arguments: object) -> Ended:
    """`python -m jaxtron.evaluate` with these words."""
    return run_main(evaluate.main, arguments)


def figures(folder: Path, *arguments: object) -> dict:
    """What the command writes with `--json`."""
    ended = run(*arguments, "--json", folder / "figures.json")
    assert (ended.code, ended.err) == (0, ""), ended
    return json.loads((folder / "figures.json").read_text())

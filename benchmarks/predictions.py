"""`python -m benchmarks.predictions [--fit]`: predicted against published steps, and the constants fitted on some."""

import functools
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.marked import read_marked
from benchmarks.record import ROOT
from jaxtron.command import configure, run_command
from jaxtron.config import Config
from jaxtron.gpus import gpu_named
from jaxtron.models.decoder.cost import model_flops_per_token
from jaxtron.models.work.profile import PROFILES
from jaxtron.plan.formula.prediction import Prediction, predict
from jaxtron.plan.machine import CONSTANTS, Machine, machine_named
from jaxtron.run.configuration import Configuration

BEGIN, END = "<!-- predictions -->", "<!-- /predictions -->"
PUBLISHED = ROOT / "tests" / "plan" / "published.yaml"
MICROBATCHES = (1, 2, 4, 8)
# What weights, gradients and activations may take of a GPU: the rest is the runtime's, and fragments.
MEMORY_FRACTION = 0.9

# What the published steps decide; docs/prediction.md says where the other constants come from.
FITTED = "product_fraction"


@dataclass(frozen=True)
class Row:
    """One published step."""

    name: str
    source: str
    gpu: str
    profile: str
    model: tuple[int, int, int]
    vocab: int
    length: int
    recompute: Literal["none", "selective", "full"]
    dropout: float
    zero: str
    tensor: int
    pipe: int
    gpus: int
    batch: int
    microbatch: int | None
    chunks: int | None
    fitted: bool
    seconds: float | None = None
    tflops: float | None = None
    flops: Literal["model", "hardware"] | None = None

    @property
    def data(self) -> int:
        """Replicas."""
        return self.gpus // (self.tensor * self.pipe)

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh."""
        return {"pipe": self.pipe, "data": self.data, "fsdp": 1, "context": 1, "tensor": self.tensor}

    @property
    def step_flops(self) -> float:
        """FLOPs of a step on all GPUs, as the source counts them."""
        layers, hidden, _ = self.model
        tokens = self.batch * self.length
        if self.flops == "hardware":
            # 2104.04473 Eq. 3
            inner = 1 + self.length / (6 * hidden) + self.vocab / (16 * layers * hidden)
            return 96.0 * tokens * layers * hidden**2 * inner
        return model_flops_per_token(self.config(1, 1).model, self.length) * tokens

    @property
    def published(self) -> float:
        """Seconds of the step."""
        if self.seconds is not None:
            return self.seconds
        assert self.tflops is not None
        return self.step_flops / (self.gpus * self.tflops * 1e12)

    def config(self, microbatch: int, chunks: int) -> Configuration:
        """The run, with so many sequences in a microbatch of a replica."""
        layers, hidden, heads = self.model
        model = {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_heads": heads,
            "vocab_size": self.vocab,
            "vocab_multiple": 1024,
            "dropout": self.dropout,
            "attention_dropout": self.dropout,
            "recompute": self.recompute,
        }
        pipeline = {"schedule": "interleaved", "chunks": chunks} if chunks > 1 else {}
        return Configuration.model_validate(
            {
                "model": model,
                "data": {"sequence_length": self.length},
                "train": {
                    "global_batch": self.batch,
                    "microbatches": self.batch // (self.data * microbatch),
                },
                "mesh": self.sizes,
                "pipeline": pipeline,
                "sharding": {"zero": self.zero},
            }
        )

    def choices(self) -> list[tuple[int, int]]:
        """Microbatch and chunks: as published, or all that divide and fit the memory roughly."""
        layers = self.model[0]
        microbatches = MICROBATCHES if self.microbatch is None else (self.microbatch,)
        stage = layers // self.pipe
        divisors = [count for count in range(1, stage + 1) if self.pipe > 1 and stage % count == 0] or [1]
        room = MEMORY_FRACTION * gpu_named(self.gpu).memory_bytes
        found = []
        for microbatch in microbatches:
            if self.batch % (self.data * microbatch):
                continue
            count = self.batch // (self.data * microbatch)
            for chunks in divisors if self.chunks is None else (self.chunks,):
                # Megatron's interleaved schedule runs multiples of the stages
                if chunks > 1 and self.chunks is None and count % self.pipe:
                    continue
                if self.microbatch is not None or self.memory(microbatch, chunks) < room:
                    found.append((microbatch, chunks))
        return found

    def memory(self, microbatch: int, chunks: int) -> float:
        """Bytes of the first stage: states, and activations by 2205.05198, Table 2, with its factor for chunks."""
        layers, hidden, heads = self.model
        parameters = (12 * layers / self.pipe * hidden**2 + self.vocab * hidden) / self.tensor
        states = parameters * (6 + 12 / self.data if self.zero == "optimizer" else 18)
        tokens = self.length * microbatch * hidden
        scores = 0 if self.profile == "megatron_2024" else 5 * heads * self.length / hidden
        kept = {"full": 2.0, "selective": 34 / self.tensor, "none": (34 + scores) / self.tensor}[self.recompute]
        window = (10 + 24 / self.tensor + scores / self.tensor) if self.recompute == "full" else 0
        more = 1 + (self.pipe - 1) / (self.pipe * chunks) if chunks > 1 else 1
        return states + tokens * (kept * layers * more + window)


@dataclass(frozen=True)
class Result:
    """A row with its prediction, and the microbatch and chunks that it is of."""

    row: Row
    prediction: Prediction
    microbatch: int
    chunks: int

    @property
    def error(self) -> float:
        """Predicted over published seconds, less one."""
        return self.prediction.step_seconds / self.row.published - 1


def read_rows(path: Path = PUBLISHED) -> list[Row]:
    """The published rows."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = []
    for entry in tree["rows"]:
        fields: dict[str, Any] = tree["defaults"][entry["defaults"]] | entry
        fields.pop("defaults")
        rows.append(Row(**fields | {"model": tuple(fields["model"])}))
    return rows


def predict_row(row: Row, machine: Machine | None = None, choices: Sequence[tuple[int, int]] | None = None) -> Result:
    """The fastest of the row's choices of microbatch and chunks."""
    machine = machine or machine_named(row.gpu)
    found = []
    for microbatch, chunks in choices or row.choices():
        prediction = predict(row.config(microbatch, chunks), row.sizes, machine, profile=PROFILES[row.profile])
        found.append(Result(row, prediction, microbatch, chunks))
    return min(found, key=lambda result: result.prediction.step_seconds)


def fit(rows: Sequence[Row], machine: Machine) -> Machine:
    """The machine whose `FITTED` constant makes the sum of |log(predicted / published)| over the rows least.

    Tried are all of three decimals in steps of 0.02 and then of 0.002 around the best; microbatches and chunks are
    chosen anew for each step, by the constant found so far.
    """
    for step, reach in ((0.02, 15), (0.002, 12)):
        choices = [(one.row, [(one.microbatch, one.chunks)]) for one in (predict_row(row, machine) for row in rows)]
        middle = getattr(machine, FITTED)
        values = (round(middle + step * number, 3) for number in range(-reach, reach + 1))
        machines = [machine.model_copy(update={FITTED: value}) for value in values if 0 < value <= 1]
        machine = min(machines, key=functools.partial(_loss, choices))
    return machine


def _loss(choices: Sequence[tuple[Row, list[tuple[int, int]]]], machine: Machine) -> float:
    return sum(abs(math.log1p(predict_row(row, machine, choice).error)) for row, choice in choices)


def refit(path: Path = CONSTANTS) -> None:
    """Writes the fitted constant of each GPU with published steps into the file of constants; comments stay."""
    rows, text = read_rows(), path.read_text(encoding="utf-8")
    for gpu in dict.fromkeys(row.gpu for row in rows):
        machine = fit([row for row in rows if row.gpu == gpu and row.fitted], machine_named(gpu))
        pattern = rf"(^{gpu}:\n(?:  .*\n)*?  {FITTED}: )\S+"
        text, count = re.subn(pattern, rf"\g<1>{getattr(machine, FITTED)}", text, flags=re.MULTILINE)
        assert count == 1, f"{path} has no {FITTED} of {gpu}"
    path.write_text(text, encoding="utf-8")
    machine_named.cache_clear()


def summary(results: Sequence[Result]) -> str:
    """Median and largest error by GPU, of the rows fitted and of those held out, as a Markdown table."""
    lines = ["| GPU | rows | count | median error | largest error |", "|---|---|---|---|---|"]
    for gpu in dict.fromkeys(result.row.gpu for result in results):
        for fitted, label in ((True, "fitted"), (False, "held out")):
            errors = [abs(one.error) for one in results if one.row.gpu == gpu and one.row.fitted == fitted]
            numbers = f"{statistics.median(errors):.1%} | {max(errors):.1%}"
            lines.append(f"| {gpu} | {label} | {len(errors)} | {numbers} |")
    return "\n".join(lines)


def table(results: Sequence[Result]) -> str:
    """Every row as a line of a Markdown table: seconds and TFLOP/s a GPU, published and predicted."""
    lines = [
        "| row | source | used for | microbatch, chunks | published s | predicted s | TFLOP/s a GPU | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        row, predicted = result.row, result.prediction.step_seconds
        rates = [row.step_flops / (row.gpus * seconds * 1e12) for seconds in (row.published, predicted)]
        tuned = "" if row.microbatch and row.chunks else " (ours)"
        cells = (
            row.name,
            row.source,
            "fit" if row.fitted else "held out",
            f"{result.microbatch}, {result.chunks}{tuned}",
            f"{row.published:.2f}",
            f"{predicted:.2f}",
            f"{rates[0]:.0f}, {rates[1]:.0f}",
            f"{result.error:+.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class PredictionsConfig(Config):
    """What is done besides the table."""

    fit: bool = False
    """Fit the constants anew, on the rows of published.yaml that say so, and write them into machines.yaml."""
    document: str = str(ROOT / "docs" / "prediction.md")
    """File with the two marks."""


def main(argv: list[str]) -> int:
    """Puts the table into the document, in place of what is between its marks."""
    purpose = f"Predict the published steps and write the table between {BEGIN} and {END}."
    config = configure(PredictionsConfig, argv, program="python -m benchmarks.predictions", purpose=purpose)
    if config is None:
        return 0
    marked = read_marked(config.document, BEGIN, END)
    if config.fit:
        refit()
    results = [predict_row(row) for row in read_rows()]
    content = f"{summary(results)}\n\n{table(results)}"
    marked.write(content)
    print(content)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

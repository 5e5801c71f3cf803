"""`python -m benchmarks.mixtures [--fit]`: published steps of mixtures predicted, and constants fitted on some."""

import functools
import itertools
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from benchmarks.marked import read_marked
from benchmarks.record import ROOT
from jaxtron.command import configure, run_command
from jaxtron.config import Config, load
from jaxtron.models.work.profile import PROFILES
from jaxtron.plan.formula.prediction import Prediction, predict
from jaxtron.plan.machine import CONSTANTS, Machine, machine_named
from jaxtron.run.configuration import Configuration

BEGIN, END = "<!-- mixtures -->", "<!-- /mixtures -->"
PUBLISHED = ROOT / "tests" / "plan" / "published_mixtures.yaml"
GPU, PROFILE = "h100", "megatron_2024"
FITTED = ("product_fraction", "exchange_fraction")


@dataclass(frozen=True)
class Row:
    """One published step."""

    name: str
    source: str
    config: str
    gpus: int
    length: int
    batch: int
    context: int
    tensor: int
    expert: int
    pipe: int
    expert_tensor: int
    mfu: float
    fitted: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh, by flag of the layers' view."""
        data = self.gpus // (self.pipe * self.context * self.tensor)
        return {"pipe": self.pipe, "data": data, "fsdp": 1, "context": self.context, "tensor": self.tensor}

    @functools.cached_property
    def runs(self) -> list[Configuration]:
        """The run, with every number of chunks that divides its stages and that Megatron's schedule can feed."""
        whole = load(Configuration, ROOT / "configs" / f"{self.config}.yaml", [])
        layers, count = whole.model.num_layers // self.pipe, self.batch // self.sizes["data"]
        chunks = [number for number in range(1, layers + 1) if layers % number == 0]
        return [self._run(count, number) for number in chunks if number == 1 or count % self.pipe == 0]

    def _run(self, microbatches: int, chunks: int) -> Configuration:
        flags = {
            "data.sequence_length": self.length,
            "train.global_batch": self.batch,
            "train.microbatches": microbatches,
            "model.recompute": "none",
            "pipeline.schedule": "interleaved" if chunks > 1 else "1f1b",
            "pipeline.chunks": chunks,
            "mesh.expert": self.expert,
            "mesh.expert_tensor": self.expert_tensor,
            **{f"mesh.{flag}": size for flag, size in self.sizes.items()},
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return load(Configuration, ROOT / "configs" / f"{self.config}.yaml", words)

    @property
    def step_flops(self) -> float:
        """FLOPs of a step on all GPUs. Of the scores those below the diagonal: the published utilization falls with the
        sequence, which it would not if all were counted."""
        run = self.runs[0]
        model = run.model
        scores = 12.0 * self.length * model.num_layers * model.num_heads * model.head_size
        return (run.family.flops_per_token(model, self.length) - scores / 2) * self.batch * self.length

    @functools.cached_property
    def published(self) -> float:
        """Seconds of the step."""
        return self.step_flops / (self.gpus * self.mfu / 100 * machine_named(GPU).datasheet.peak_flops)


@dataclass(frozen=True)
class Result:
    """A row with its prediction, and the run that it is of."""

    row: Row
    prediction: Prediction
    run: Configuration

    @property
    def error(self) -> float:
        """Predicted over published seconds, less one."""
        return self.prediction.step_seconds / self.row.published - 1

    @property
    def mfu(self) -> float:
        """In percent, counted as the row counts."""
        return self.row.mfu / (1 + self.error)


def read_rows() -> list[Row]:
    """The published rows."""
    return [Row(**entry) for entry in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["rows"]]


def machine() -> Machine:
    """The machine of these runs, whose products are faster than those of the older ones behind machines.yaml."""
    fraction = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["product_fraction"]
    return machine_named(GPU).model_copy(update={"product_fraction": fraction})


def predict_row(row: Row, machine: Machine) -> Result:
    """The fastest of the row's choices of chunks."""
    found = (_predict(row, run, machine) for run in row.runs)
    return min(found, key=lambda result: result.prediction.step_seconds)


def _predict(row: Row, run: Configuration, machine: Machine) -> Result:
    return Result(row, predict(run, row.sizes, machine, profile=PROFILES[PROFILE]), run)


def fit(rows: Sequence[Row], start: Machine) -> Machine:
    """The machine whose product_fraction and exchange_fraction make the sum of |log(predicted / published)| least.

    One after the other, in steps of 0.05 and then of 0.01 around the best; chunks are chosen anew for each step.
    """
    best = start
    for step, name in itertools.product((0.05, 0.01), FITTED):
        runs = [(row, predict_row(row, best).run) for row in rows]
        values = [round(getattr(best, name) + step * number, 2) for number in range(-6, 7)]
        machines = [best.model_copy(update={name: value}) for value in values if 0 < value <= 1]
        best = min(machines, key=functools.partial(_loss, runs))
    return best


def _loss(runs: Sequence[tuple[Row, Configuration]], machine: Machine) -> float:
    return sum(abs(math.log1p(_predict(row, run, machine).error)) for row, run in runs)


def refit() -> None:
    """Writes the fitted constants: of these runs' products into their file, of exchanges into machines.yaml."""
    found = fit([row for row in read_rows() if row.fitted], machine())
    for path, name in zip((PUBLISHED, CONSTANTS), FITTED, strict=True):
        pattern, text = rf"(^ *{name}: )\S+", path.read_text(encoding="utf-8")
        text, count = re.subn(pattern, rf"\g<1>{getattr(found, name)}", text, flags=re.MULTILINE)
        assert count, f"{path} has no {name}"
        path.write_text(text, encoding="utf-8")
    machine_named.cache_clear()


def table(results: Sequence[Result]) -> str:
    """Median and largest error, and every row: published and predicted MFU, and the error of the step's seconds."""
    lines = ["| rows | count | median error | largest error |", "|---|---|---|---|"]
    for label, chosen in (("fitted", True), ("held out", False)):
        errors = [abs(one.error) for one in results if one.row.fitted == chosen]
        lines.append(f"| {label} | {len(errors)} | {statistics.median(errors):.1%} | {max(errors):.1%} |")
    lines += ["", "| row | source | used for | mesh | chunks | published MFU | predicted MFU | error of seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for one in results:
        row = one.row
        flags = ("pipe", "data", "context", "tensor", "expert", "expert_tensor")
        sizes = row.sizes | {"expert": row.expert, "expert_tensor": row.expert_tensor}
        mesh = " x ".join(f"{flag} {sizes[flag]}" for flag in flags if sizes[flag] > 1)
        used = "fit" if row.fitted else "held out"
        cells = (row.name, row.source, used, mesh, str(one.run.pipeline.chunks), f"{row.mfu:.1f}", f"{one.mfu:.1f}")
        lines.append(f"| {' | '.join(cells)} | {one.error:+.1%} |")
    return "\n".join(lines)


class MixturesConfig(Config):
    """What is done besides the table."""

    fit: bool = False
    """Fit the constants anew, on the rows of published_mixtures.yaml that say so, and write them."""
    document: str = str(ROOT / "docs" / "prediction.md")
    """File with the two marks."""


def main(argv: list[str]) -> int:
    """Puts the table into the document, in place of what is between its marks."""
    purpose = f"Predict the published steps of mixtures and write the table between {BEGIN} and {END}."
    config = configure(MixturesConfig, argv, program="python -m benchmarks.mixtures", purpose=purpose)
    if config is None:
        return 0
    marked = read_marked(config.document, BEGIN, END)
    if config.fit:
        refit()
    content = table([predict_row(row, machine()) for row in read_rows()])
    marked.write(content)
    print(content)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

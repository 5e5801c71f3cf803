"""The loss of a state on data that it does not train on."""

import math
from collections.abc import Sequence
from typing import Literal

from jaxtron.data.loader import validation_batches
from jaxtron.data.source import Source
from jaxtron.run.state import TrainState
from jaxtron.train.divergence import diverged
from jaxtron.train.setup import Run
from jaxtron.typing import Array


def validate(run: Run, state: TrainState, part: Literal["validation", "test"] = "validation") -> dict[str, float]:
    """Over batches of a part of the data, by names that begin with it, as `validation_loss`: the mean negative
    log-likelihood, in nats a token, and what else the model's family tells (`Program.figures`); empty where it has no
    tokens.

    What is read follows from train.global_batch and train.validation_batches alone: it is the same on every mesh, in
    any number of microbatches and processes. A `UserError` where the loss is not finite.
    """
    source = run.data.validation if part == "validation" else run.data.test
    found = _figures(run, state, source, run.config.train.validation_batches, f"{part} loss")
    return {f"{part}_{name}": value for name, value in found.items()}


def check_loss(run: Run, state: TrainState) -> None:
    """`UserError` if the state gives a loss that is not finite on a batch of the validation data, or of training's."""
    source = run.data.validation if len(run.data.validation) else run.data.train
    _figures(run, state, source, 1, "loss")


def _figures(run: Run, state: TrainState, source: Source, max_batches: int | None, name: str) -> dict[str, float]:
    batches = validation_batches(
        source,
        batch_size=run.config.train.global_batch,
        local_rows=run.session.batches.local_rows,
        max_batches=max_batches,
    )
    found = [run.session.evaluate(state.model, run.session.batches.globalize(batch)) for batch in batches]
    sums, counts = (_totals(part) for part in zip(*found, strict=True)) if found else ({}, {})
    if not any(counts.values()):
        return {}
    program = run.session.trainer.program
    loss = program.loss(sums, counts)
    if not math.isfinite(loss):
        step = int(state.step)
        raise diverged(run.checkpoints, step, f"the {name} is {loss} after step {step}")
    return {"loss": loss, **program.figures(run.config.model, sums, counts)}


def _totals(found: Sequence[dict[str, Array]]) -> dict[str, float]:
    """Sums of what batches have under the same names; they are waited for only here."""
    return {name: sum(float(part[name]) for part in found) for name in found[0]}

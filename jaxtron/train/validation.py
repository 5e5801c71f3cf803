"""The loss of a state on data that it does not train on."""

import math

from jaxtron.data.loader import validation_batches
from jaxtron.data.source import Source
from jaxtron.train.setup import Run
from jaxtron.train.step import TrainState


def validate(run: Run, state: TrainState, source: Source | None = None) -> float:
    """Mean negative log-likelihood, in nats a token, over batches of the validation data or of another source; NaN
    where there are none.

    What is read follows from train.global_batch and train.validation_batches alone: it is the same on every mesh, in
    any number of microbatches and processes.
    """
    batches = validation_batches(
        run.data.validation if source is None else source,
        batch_size=run.config.train.global_batch,
        local_rows=run.placement.local_rows,
        max_batches=run.config.train.validation_batches,
    )
    sums = [run.evaluate(state.params, run.placement.globalize(batch)) for batch in batches]
    weight = sum(float(weight) for _, weight in sums)
    return sum(float(nll) for nll, _ in sums) / weight if weight else math.nan

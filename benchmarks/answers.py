"""How many answers of a trained model are right, each character predicted after the right ones before it."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float

from benchmarks.recall import Example
from jaxtron.data.batch import TokenBatch, stack_samples
from jaxtron.data.packing import pack_row
from jaxtron.evaluate.model import open_model
from jaxtron.evaluate.request import EvaluateRequest, read_configuration
from jaxtron.models.program import Microbatch
from jaxtron.pipeline import executor
from jaxtron.pipeline.model import HeadOutput, Model, Outer, Stream
from jaxtron.pipeline.partition import forward_only
from jaxtron.run.step import Trainer
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, PyTree

ROWS = 32


def score(run: Path, examples: Sequence[Example]) -> dict[int, dict[str, float]]:
    """Of the newest checkpoint of a run of one stack: the share of whole answers that are right, and of characters.

    By the size of the examples; a character is right where the model's best guess is the one that stands there.
    """
    request = EvaluateRequest(run=run, text=())
    trained, config = read_configuration(request)
    found: dict[int, list[tuple[bool, float]]] = {}
    with open_model(request, trained, config) as model:
        is_right = _scorer(model.session.trainer)
        for start in range(0, len(examples), ROWS):
            part = examples[start : start + ROWS]
            rows = [pack_row([example.sequence()], model.sequence_length) for example in part]
            # one shape: the last rows are made as many
            batch = stack_samples([*rows, *rows[:1] * (ROWS - len(rows))])
            found_right = np.asarray(is_right(model.params, Microbatch(batch, jnp.arange(ROWS))))
            for example, row, right in zip(part, rows, found_right, strict=False):
                found.setdefault(example.size, []).extend(answers(right, row.weights))
    return {
        size: {"whole": round(float(whole), 4), "characters": round(float(characters), 4)}
        for size, (whole, characters) in ((size, np.mean(shares, axis=0)) for size, shares in found.items())
    }


def answers(is_right: Bool[np.ndarray, "S"], weights: Float[np.ndarray, "S"]) -> list[tuple[bool, float]]:
    """For each run of places with weight: whether all are right, and the share that is."""
    edges = np.flatnonzero(np.diff(weights > 0, prepend=False, append=False))
    spans = (is_right[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
    return [(bool(span.all()), float(span.mean())) for span in spans]


def _scorer(trainer: Trainer) -> Callable[[PyTree, Microbatch[TokenBatch]], Bool[Array, "B S"]]:
    lie, whole = manual_specs(trainer.blueprint.parameters), PartitionSpec()
    return jax.jit(region(functools.partial(_is_right, trainer), (lie, whole), whole))


def _is_right(trainer: Trainer, params: PyTree, rows: Microbatch[TokenBatch]) -> Bool[Array, "B S"]:
    """Whether the likeliest id after each place is the one that stands there; on a mesh of one device."""
    program, parts = trainer.program, trainer.parts

    def head(outer: Outer, x: Stream, microbatch: Microbatch[TokenBatch]) -> HeadOutput:
        # no loss, for nothing is trained
        guess = parts.outer(outer).predict(x).argmax(-1)
        return HeadOutput(jnp.float32(0.0), {"right": (guess == microbatch.batch.targets).astype(jnp.float32)})

    model = program.model(parts, None)
    table, microbatches = forward_only(trainer.stages), jax.tree.map(lambda leaf: vary(leaf[None]), rows)
    result = executor.run(table, trainer.stages, Model(model.stacks, head), trainer.working(params), microbatches)
    return all_reduce(vary(result.sums["right"]), current().manual) > 0

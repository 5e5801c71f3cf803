"""What a pipeline has to equal: a model's functions one after the other, differentiated by JAX, without an executor."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.pipeline.executor import Result
from jaxtron.pipeline.model import Microbatch, Model, Parameters
from jaxtron.typing import PyTree


def plain(
    model: Model,
    params: Parameters,
    microbatches: Sequence[Microbatch],
    kinds: Sequence[tuple[str, ...]] | None = None,
) -> tuple[Any, Result]:
    """The differentiated loss, and what the executor gives: gradients, sums, metrics with a row for each layer.

    `params` has the layers in the model's order, `kinds` the kinds of each stack's (`Partition.kinds`; none: alike).
    """
    kinds = kinds or ((),) * len(model.stacks)

    def loss(params: Parameters) -> tuple[Any, tuple[PyTree, PyTree]]:
        found: list[tuple[Any, PyTree, tuple[PyTree, ...]]] = []
        for microbatch in microbatches:
            before = jax.tree.map(lambda *rows: sum(rows), *(metrics for _, _, metrics in found)) if found else None
            found.append(_one(model, params, microbatch, before, kinds))
        total, *reported = (jax.tree.map(lambda *parts: sum(parts), *part) for part in zip(*found, strict=True))
        return total, tuple(reported)

    (total, (sums, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return total, Result(gradients, sums, metrics)


def _one(
    model: Model,
    params: Parameters,
    microbatch: Microbatch,
    before: tuple[PyTree, ...] | None,
    kinds: Sequence[tuple[str, ...]],
) -> tuple[Any, PyTree, tuple[PyTree, ...]]:
    """Loss, sums and layers' metrics of one microbatch, after those of the ones `before` it."""
    losses, metrics, stream = [], [], None
    for place, (stack, layers, own) in enumerate(zip(model.stacks, params.stacks, kinds, strict=True)):
        stream, found = stack.enter(params.outer, stream, microbatch), []
        for number, (kind, row, weights) in enumerate(one_by_one(layers, own)):
            shared = stack.shared(microbatch)
            if stack.recall is not None:
                if before is None:
                    metrics_now = stack.layer(weights, stream, jnp.int32(number), shared).metrics
                    so_far = jax.tree.map(jnp.zeros_like, metrics_now)
                else:
                    rows = before[place][kind] if kind else before[place]
                    so_far = jax.tree.map(lambda rows, row=row: rows[row], rows)
                shared = stack.recall(shared, jax.lax.stop_gradient(so_far))
            output = stack.layer(weights, stream, jnp.int32(number), shared)
            stream = output.stream
            found.append((kind, output.metrics))
            losses += [] if output.loss is None else [output.loss]
        by_kind = {
            kind: jax.tree.map(lambda *rows: jnp.stack(rows), *(rows for other, rows in found if other == kind))
            for kind, _ in found
        }
        metrics.append(by_kind if own else by_kind[None])
    loss, sums = model.head(params.outer, stream, microbatch)
    return sum(losses, loss), sums, tuple(metrics)


def one_by_one(layers: PyTree, kinds: tuple[str, ...]) -> Iterator[tuple[str | None, int, PyTree]]:
    """The kind of each layer, if any, its row among those that are alike, and its weights as a layer function gets
    them."""
    for number in range(len(kinds) or len(jax.tree.leaves(layers)[0])):
        kind = kinds[number] if kinds else None
        row = kinds[:number].count(kind) if kinds else number
        yield kind, row, jax.tree.map(lambda leaf, row=row: leaf[row], {kind: layers[kind]} if kind else layers)

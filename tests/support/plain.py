"""What a pipeline has to equal: a model's functions one after the other, differentiated by JAX, without an executor."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.pipeline.executor import Result
from jaxtron.pipeline.model import Microbatch, Model, Parameters
from jaxtron.typing import PyTree


def plain(model: Model, params: Parameters, microbatches: Sequence[Microbatch]) -> tuple[Any, Result]:
    """The differentiated loss, and what the executor gives: gradients, sums, metrics with a row for each layer.

    `params` has the layers in the model's order.
    """

    def loss(params: Parameters) -> tuple[Any, tuple[PyTree, PyTree]]:
        found: list[tuple[Any, PyTree, tuple[PyTree, ...]]] = []
        for microbatch in microbatches:
            before = jax.tree.map(lambda *rows: sum(rows), *(metrics for _, _, metrics in found)) if found else None
            found.append(_one(model, params, microbatch, before))
        total, *reported = (jax.tree.map(lambda *parts: sum(parts), *part) for part in zip(*found, strict=True))
        return total, tuple(reported)

    (total, (sums, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return total, Result(gradients, sums, metrics)


def _one(
    model: Model, params: Parameters, microbatch: Microbatch, before: tuple[PyTree, ...] | None
) -> tuple[Any, PyTree, tuple[PyTree, ...]]:
    """Loss, sums and layers' metrics of one microbatch, after those of the ones `before` it."""
    losses, metrics, stream = [], [], None
    for place, (stack, layers) in enumerate(zip(model.stacks, params.stacks, strict=True)):
        stream, found = stack.enter(params.outer, stream, microbatch), []
        for number in range(len(jax.tree.leaves(layers)[0])):
            weights = jax.tree.map(lambda leaf, number=number: leaf[number], layers)
            shared = stack.shared(microbatch)
            if stack.recall is not None:
                if before is None:
                    metrics_now = stack.layer(weights, stream, jnp.int32(number), shared).metrics
                    so_far = jax.tree.map(jnp.zeros_like, metrics_now)
                else:
                    so_far = jax.tree.map(lambda rows, number=number: rows[number], before[place])
                shared = stack.recall(shared, jax.lax.stop_gradient(so_far))
            output = stack.layer(weights, stream, jnp.int32(number), shared)
            stream = output.stream
            found.append(output.metrics)
            losses += [] if output.loss is None else [output.loss]
        metrics.append(jax.tree.map(lambda *rows: jnp.stack(rows), *found))
    loss, sums = model.head(params.outer, stream, microbatch)
    return sum(losses, loss), sums, tuple(metrics)

"""Logits of a batch, by the functions that a pipeline runs, one layer after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxtron.data.batch import TokenBatch
from jaxtron.models.decoder.decode import Steps
from jaxtron.models.program import Microbatch
from jaxtron.run.step import Trainer
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, PyTree
from tests.support.plain import one_by_one


def logits(trainer: Trainer, params: PyTree, tokens: np.ndarray) -> np.ndarray:
    """Those of tokens [B, S] on a mesh of one device, float32 [B, S, padded vocabulary]; inside `sharding.use`."""
    batch = TokenBatch(tokens, tokens, np.ones(tokens.shape, np.float32))
    lie, whole = manual_specs(trainer.blueprint.parameters), PartitionSpec()
    run = jax.jit(region(functools.partial(_logits, trainer), (lie, whole), whole))
    return np.asarray(run(params, Microbatch(batch, np.arange(len(tokens)))))


def _logits(trainer: Trainer, params: PyTree, batch: Microbatch[TokenBatch]):
    program, parts = trainer.program, trainer.parts
    model, working = program.model(parts, None), trainer.working(params)
    (stack,), (layers,) = model.stacks, working.stacks
    x, inputs = stack.enter(working.outer, None, batch), stack.shared(batch)
    for number, (_, _, weights) in enumerate(one_by_one(layers, trainer.stages.partitions[0].kinds)):
        x = stack.layer(weights, x, jnp.int32(number), inputs).stream
    # the one device has all of it
    return all_reduce(vary(parts.outer(working.outer).predict(x)), current().manual)


def decoded(trainer: Trainer, params: PyTree, tokens: np.ndarray, parts: tuple[int, ...]) -> np.ndarray:
    """Those after each of the parts that tokens [B, S] come in, of these lengths, float32 [B, parts, vocabulary].

    Rows are shared out along `data` and `fsdp`.
    """
    lie, rows = manual_specs(trainer.blueprint.parameters), PartitionSpec(current().axes("data", "fsdp"))
    run = jax.jit(region(functools.partial(_decoded, trainer, parts), (lie, rows), rows))
    return np.asarray(run(params, tokens))


def _decoded(trainer: Trainer, parts: tuple[int, ...], params: PyTree, tokens: Array):
    steps = Steps(trainer.blueprint.module(trainer.parts.join(trainer.working(params))))
    memory, found, start = steps.start(*tokens.shape), [], 0
    for length in parts:
        logits, memory = steps.advance(tokens[:, start : start + length], memory)
        found.append(logits)
        start += length
    # along the other axes there is one device
    others = tuple(axis for axis in current().manual if axis not in current().axes("data", "fsdp"))
    return all_reduce(vary(jnp.stack(found, 1)), others)

"""Logits of a batch, by the functions that a pipeline runs, one layer after the other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxtron.data.batch import TokenBatch
from jaxtron.models.decoder.decode import Steps
from jaxtron.models.program import Microbatch
from jaxtron.run.step import Trainer
from jaxtron.sharding.collectives import all_reduce, largest, vary
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


def stack_logits(trainer: Trainer, params: PyTree, batch: Any) -> np.ndarray:
    """Those of what a family's last stack reads of a batch, on a mesh of one device; inside `sharding.use`."""

    def run(params: PyTree, batch: Microbatch[Any]) -> Array:
        model, working = trainer.program.model(trainer.parts, None), trainer.working(params)
        stream = None
        for stack, layers, partition in zip(model.stacks, working.stacks, trainer.stages.partitions, strict=True):
            stream = stack.enter(working.outer, stream, batch)
            for number, (_, _, weights) in enumerate(one_by_one(layers, partition.kinds)):
                stream = stack.layer(weights, stream, jnp.int32(number), stack.shared(batch)).stream
        assert trainer.program.logits is not None
        found = trainer.program.logits(trainer.parts, working.outer, stream)
        return all_reduce(vary(found), current().manual)

    lie, whole = manual_specs(trainer.blueprint.parameters), PartitionSpec()
    rows = jnp.arange(len(batch.tokens))
    return np.asarray(jax.jit(region(run, (lie, whole), whole))(params, Microbatch(batch, rows)))


def decoded(trainer: Trainer, params: PyTree, tokens: np.ndarray, parts: tuple[int, ...]) -> np.ndarray:
    """Those after each of the parts that tokens [B, S] come in, of these lengths, float32 [B, parts, vocabulary]."""

    def run(steps: Steps, tokens: Array) -> Array:
        memory, found, start = steps.start(*tokens.shape, most=max(parts)), [], 0
        for length in parts:
            logits, memory = steps.advance(tokens[:, start : start + length], memory, begins=start == 0)
            found.append(logits)
            start += length
        return jnp.stack(found, 1)

    return _of_steps(run, trainer, params, tokens)


def grown(trainer: Trainer, params: PyTree, tokens: np.ndarray, starts: np.ndarray, num_steps: int) -> np.ndarray:
    """Those after the first `starts` of each row of tokens [B, S], and after each of further ones, which come alone:
    float32 [B, 1 + num_steps, vocabulary]."""

    def run(steps: Steps, tokens: Array, starts: Array) -> Array:
        memory = steps.start(*tokens.shape)
        logits, memory = steps.advance(tokens, memory, starts, begins=True)
        found = [logits]
        for _ in range(num_steps):
            token = jnp.take_along_axis(tokens, memory.lengths[:, None], 1)
            logits, memory = steps.advance(token, memory)
            found.append(logits)
        return jnp.stack(found, 1)

    return _of_steps(run, trainer, params, tokens, starts)


def _of_steps(run: Callable[..., Array], trainer: Trainer, params: PyTree, *arrays: np.ndarray) -> np.ndarray:
    """What a function of a decoder in steps and of rows makes, which are shared out along `data` and `fsdp`."""

    def local(params: PyTree, *arrays: Array) -> Array:
        module = trainer.blueprint.module(trainer.parts.join(trainer.working(params)))
        found = run(Steps(module, trainer.stages.partitions[0]), *arrays)
        # along the other axes all devices have the same
        others = tuple(axis for axis in current().manual if axis not in current().axes("data", "fsdp"))
        return largest(vary(found), others)

    lie, rows = manual_specs(trainer.blueprint.parameters), PartitionSpec(current().axes("data", "fsdp"))
    return np.asarray(jax.jit(region(local, (lie, *(rows for _ in arrays)), rows))(params, *arrays))

"""Text from a model: one token after another, each from a whole forward over a window of the sequence."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int32, Integer

from jaxtron.data.batch import TokenBatch
from jaxtron.models.program import Microbatch
from jaxtron.pipeline import executor
from jaxtron.pipeline.model import HeadOutput, Model, Outer, Parameters, Stack, Stream
from jaxtron.pipeline.partition import forward_only
from jaxtron.run.step import Trainer
from jaxtron.sharding.collectives import all_reduce, largest, vary
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, use
from jaxtron.typing import Array, Float, Int, Key, PyTree

# drawn from logits that are not finite
NO_TOKEN = -1


def sample(
    trainer: Trainer,
    params: PyTree,
    prompt: Integer[np.ndarray, "P"],
    *,
    num_tokens: int,
    window: int,
    vocab: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> Int32[np.ndarray, "N"]:
    """`num_tokens` tokens after `prompt`, drawn at `temperature`; the model sees the last `window` tokens.

    Every device computes the same, but for its stage of a pipeline; there is no cache of keys and values. A
    `FloatingPointError` where the model's logits are not finite.
    """
    prompt = prompt[-window:]
    start = np.zeros(window, np.int32)
    start[: len(prompt)] = prompt
    specs = manual_specs(trainer.blueprint.parameters)
    scalar = PartitionSpec()
    settings = {"num_tokens": num_tokens, "length": len(prompt), "vocab": vocab, "temperature": temperature}
    # a row is short, and whole on every device
    with use(current().without("context")):
        local = partial(_local, trainer, **settings)
        run = jax.jit(region(local, (specs, scalar, scalar), scalar))
        tokens = np.asarray(run(params, jnp.asarray(start), jax.random.key(seed)))
    if (tokens == NO_TOKEN).any():
        raise FloatingPointError(f"the logits of token {np.argmax(tokens == NO_TOKEN) + 1} are not finite")
    return tokens


def _local(
    trainer: Trainer,
    params: PyTree,
    tokens: Int[Array, "S"],
    key: Key[Array, ""],
    *,
    num_tokens: int,
    length: int,
    vocab: int,
    temperature: float,
) -> Int[Array, "N"]:
    working = trainer.working(params)

    def step(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        tokens, filled = carry
        logits = _next_logits(trainer, working, tokens, filled).astype(jnp.float32)
        is_known = jnp.arange(logits.shape[0]) < vocab
        is_finite = (jnp.isfinite(logits) | ~is_known).all()
        logits = jnp.where(is_known, logits / temperature, -jnp.inf)
        token = jax.random.categorical(jax.random.fold_in(key, number), logits).astype(jnp.int32)
        token = jnp.where(is_finite, token, NO_TOKEN)
        # the same on every device: the largest of equals says so to the type system
        token = largest(vary(token), current().manual)
        is_full = filled == tokens.shape[0]
        tokens = jnp.where(is_full, jnp.roll(tokens, -1), tokens)
        filled = jnp.where(is_full, filled, filled + 1)
        return (tokens.at[filled - 1].set(token), filled), token

    carry = (tokens, jnp.int32(length))
    return jax.lax.scan(step, carry, jnp.arange(num_tokens))[1]


def _next_logits(
    trainer: Trainer, working: Parameters, tokens: Int[Array, "S"], filled: Int[Array, ""]
) -> Float[Array, "V"]:
    """Logits of what follows the first `filled` tokens, from one microbatch of one row through all stages."""
    program, parts = trainer.program, trainer.parts
    predict = program.predict
    assert predict is not None

    def head(outer: Outer, stream: Stream, microbatch: tuple[Microbatch[TokenBatch], Array]) -> HeadOutput:
        # no loss, for nothing is trained
        return HeadOutput(jnp.float32(0.0), {"logits": predict(parts, outer, stream, microbatch[1] - 1)})

    model = program.model(parts, None)
    stacks = tuple(_of_first(stack) for stack in model.stacks)
    weights = jnp.zeros(tokens.shape, jnp.float32)
    row = Microbatch(TokenBatch(tokens, tokens, weights), jnp.int32(0))
    microbatches = jax.tree.map(lambda leaf: vary(leaf[None, None]), row), vary(filled[None])
    table = forward_only(trainer.stages)
    result = executor.run(table, trainer.stages, Model(stacks, head), working, microbatches)
    # only the last stage has any
    return all_reduce(result.sums["logits"], current().axes("pipe"))


def _of_first(stack: Stack) -> Stack:
    """The stack for microbatches that are a pair, of whose first it reads."""
    return replace(
        stack,
        enter=lambda outer, stream, pair: stack.enter(outer, stream, pair[0]),
        shared=lambda pair: stack.shared(pair[0]),
    )

"""Text from a model: one token after another, each from a whole forward over a window of the sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int32, Integer

from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.staged import StagedDecoder
from jaxtron.pipeline import executor
from jaxtron.pipeline.model import HeadOutput
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.collectives import all_reduce, largest, vary
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import constrain, current, use
from jaxtron.typing import Array, DTypeLike, Float, Int, Key, PyTree

# drawn from logits that are not finite
NO_TOKEN = -1


def sample(
    blueprint: Blueprint[Decoder],
    params: PyTree,
    prompt: Integer[np.ndarray, "P"],
    *,
    partition: Partition,
    num_tokens: int,
    window: int,
    dtype: DTypeLike,
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
    specs = manual_specs(blueprint.parameters)
    scalar = PartitionSpec()
    local = partial(
        _local,
        blueprint,
        partition,
        num_tokens=num_tokens,
        length=len(prompt),
        dtype=dtype,
        vocab=vocab,
        temperature=temperature,
    )
    # a row is short, and whole on every device
    with use(current().without("context")):
        run = jax.jit(region(local, (specs, scalar, scalar), scalar))
        tokens = np.asarray(run(params, jnp.asarray(start), jax.random.key(seed)))
    if (tokens == NO_TOKEN).any():
        raise FloatingPointError(f"the logits of token {np.argmax(tokens == NO_TOKEN) + 1} are not finite")
    return tokens


def _local(
    blueprint: Blueprint[Decoder],
    partition: Partition,
    params: PyTree,
    tokens: Int[Array, "S"],
    key: Key[Array, ""],
    *,
    num_tokens: int,
    length: int,
    dtype: DTypeLike,
    vocab: int,
    temperature: float,
) -> Int[Array, "N"]:
    staged = StagedDecoder(blueprint, blueprint.working(params, dtype))

    def step(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        tokens, filled = carry
        logits = _next_logits(staged, partition, tokens, filled).astype(jnp.float32)
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
    staged: StagedDecoder, partition: Partition, tokens: Int[Array, "S"], filled: Int[Array, ""]
) -> Float[Array, "V"]:
    """Logits of what follows the first `filled` tokens, from one microbatch of one row through all stages."""

    def head(decoder: Decoder, x: Array, microbatch: tuple[Array, Array]) -> HeadOutput:
        x = constrain(x, "batch", "full_seq", "embed")
        logits = decoder.predict(jax.lax.dynamic_slice_in_dim(x, microbatch[1] - 1, 1, axis=1))
        # no loss, for nothing is trained
        return HeadOutput(jnp.float32(0.0), {"logits": constrain(logits[0, 0], None)})

    model = staged.model(
        embed=lambda decoder, microbatch: decoder.embed(microbatch[0]),
        inputs=lambda decoder, microbatch: decoder.inputs(microbatch[0].shape[1]),
        head=head,
    )
    microbatches = jax.tree.map(vary, (tokens[None, None], filled[None]))
    stages = StagePlan((partition,))
    logits = executor.run(forward_only(stages), stages, model, staged.parameters, microbatches).sums["logits"]
    # only the last stage has any
    return all_reduce(logits, current().axes("pipe"))

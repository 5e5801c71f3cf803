"""Tokens drawn of what a model predicts, without gradient, the vocabulary split over tensor."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.layers.inputs import LayerInputs, random_bits
from jaxtron.models.metro.config import PLACES
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, Float, Int, UInt32


def draw(
    x: Float[Array, "B P E"],
    table: Float[Array, "V E"],
    bias: Float[Array, "V"],
    vocab: int,
    inputs: LayerInputs,
) -> Int[Array, "B P"]:
    """One token for each place, as likely as the softmax of its logits says; entries from `vocab` on are none.

    The token is the largest of the sums of logits and Gumbel noise (Gumbel, 1954), so each part of the vocabulary finds
    its own and one comparison decides. Noise is drawn from each row's key, by place and entry: the same on every mesh.
    Logits exist for a few places of each row at a time.
    """
    x, table, bias = jax.lax.stop_gradient((constrain(x, "batch", "full_seq", "embed"), table, bias))
    rows, places, _ = x.shape
    # of a size that no mesh changes: what is drawn depends on it
    chunks = jnp.moveaxis(x.reshape(rows, places // PLACES, PLACES, -1), 1, 0)
    chunks = constrain(chunks, None, "batch", "full_seq", "embed")

    def choose(chunk: tuple[Int[Array, ""], Float[Array, "B few E"]]) -> Int[Array, "B few"]:
        number, part = chunk
        contracted = (((2,), (1,)), ((), ()))
        lies = spec("batch", "full_seq", "vocab")
        logits = jax.lax.dot_general(
            part, table, contracted, preferred_element_type=jnp.float32, out_sharding=lies
        ) + bias.astype(jnp.float32)
        bits = random_bits(logits.shape, inputs.fold(number), "batch", None, "vocab", dtype=jnp.uint32)
        return _largest(logits + gumbel(bits), vocab)

    drawn = jax.lax.map(choose, (jnp.arange(places // PLACES), chunks))
    return jnp.moveaxis(drawn, 0, 1).reshape(rows, places)


def gumbel(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Gumbel's distribution of random bits; what wins is of the smallest uniform numbers, where floats are dense."""
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    return -jnp.log(-jnp.log1p(-uniform))


def _largest(scores: Float[Array, "B few V"], vocab: int) -> Int[Array, "B few"]:
    """The entry of the largest score of those below `vocab`, of equal ones the first."""
    tensor = current().axes("tensor")

    def local(scores: Array) -> Array:
        first = jax.lax.axis_index(tensor) * scores.shape[-1]
        scores = jnp.where(first + jnp.arange(scores.shape[-1]) < vocab, scores, -jnp.inf)
        best, own = scores.max(-1), first + scores.argmax(-1)
        is_best = best == jax.lax.pmax(best, tensor)
        return jax.lax.pmin(jnp.where(is_best, own, vocab), tensor)

    return over_tensor(local, PartitionSpec(None, None, tensor), PartitionSpec())(scores)

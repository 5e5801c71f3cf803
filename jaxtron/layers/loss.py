"""Cross-entropy on a vocabulary-sharded head, a chunk of the sequence at a time."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.sharding.collectives import vary
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int

# Most logits alive at once on a device, in elements: 256 MiB of float32. On GPUs 1 GiB: of fewer tokens the product for
# the table's gradient waits for the sum that it is added to.
CHUNK_ELEMENTS = 2**26
GPU_CHUNK_ELEMENTS = 2**28

Sums = tuple[Float[Array, ""], Float[Array, ""]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x: Float[Array, "B S E"],
    table: Float[Array, "V E"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    vocab: int,
    z_loss: float,
) -> Sums:
    """Weighted sums over the tokens of `nll + z_loss * log(Z)^2` (to differentiate) and of `nll` (to report).

    `x` is split over the sequence, `table` over its rows; rows from `vocab` on are padding and take no probability.
    Gradients are formed beside the loss, chunk by chunk, so that logits are computed once and never whole. The z-loss
    is PaLM's (2204.02311 sec. 5). Only the first output has a gradient.
    """
    return _run(x, table, targets, weights, vocab=vocab, z_loss=z_loss, with_gradients=False)[:2]


def _forward(x, table, targets, weights, vocab, z_loss):
    total, nll, *gradients = _run(x, table, targets, weights, vocab=vocab, z_loss=z_loss, with_gradients=True)
    return (total, nll), gradients


def _backward(vocab, z_loss, gradients, cotangents):
    scale = cotangents[0]
    dx, dtable = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return dx, dtable, None, None


cross_entropy.defvjp(_forward, _backward)


def _run(x, table, targets, weights, *, vocab: int, z_loss: float, with_gradients: bool):
    tensor = current().axes("tensor")
    whole, rows, sequence = PartitionSpec(), PartitionSpec(tensor), PartitionSpec(None, tensor)

    def local(x: Array, table: Array, targets: Array, weights: Array):
        x = _gather_sequence(x)
        shape = x.shape
        # one axis of tokens: plain matrix products, and chunks without transposed copies
        tokens = [a.reshape(-1, *a.shape[2:]) for a in (x, targets, weights)]
        chunk = functools.partial(_chunk, vocab=vocab, z_loss=z_loss, with_gradients=with_gradients)
        total, nll, dx, dtable = _over_chunks(chunk, tokens[0], table, *tokens[1:])
        if dx is None:
            return total, nll
        return total, nll, _scatter_sequence(dx.reshape(shape)), dtable

    out_specs = (whole, whole, sequence, rows) if with_gradients else (whole, whole)
    in_specs = (sequence, rows, whole, whole)
    return over_tensor(local, in_specs, out_specs)(x, table, targets, weights)


def _gather_sequence(x: Array) -> Array:
    tensor = current().axes("tensor")
    return jax.lax.all_gather(x, tensor, axis=1, tiled=True) if current().size(tensor) > 1 else x


def _scatter_sequence(x: Array) -> Array:
    tensor = current().axes("tensor")
    return jax.lax.psum_scatter(x, tensor, scatter_dimension=1, tiled=True) if current().size(tensor) > 1 else x


def _over_chunks(chunk, x: Array, table: Array, targets: Array, weights: Array):
    """Sums and gradients over all chunks of tokens; gradients are None where `chunk` forms none."""
    tokens = x.shape[0]
    size = _chunk_length(tokens, table.shape[0])
    if size == tokens:
        total, nll, dx, dtable = chunk(x, table, targets, weights)
        return total, nll, dx, None if dtable is None else dtable.astype(table.dtype)
    split = [_split(a, size) for a in (x, targets, weights)]

    def body(dtable: Array, part):
        total, nll, dx, more = chunk(part[0], table, *part[1:])
        return dtable if more is None else dtable + more, (total, nll, dx)

    zeros = vary(jnp.zeros(table.shape, jnp.float32))
    dtable, (total, nll, dx) = jax.lax.scan(body, zeros, split)
    dx = None if dx is None else dx.reshape(-1, *x.shape[1:])[:tokens]
    return total.sum(), nll.sum(), dx, dtable.astype(table.dtype)


def _split(tokens: Array, size: int) -> Array:
    """`[chunk, size, ...]`; the last chunk is filled with zeros, which are tokens of weight 0."""
    missing = -len(tokens) % size
    padded = jnp.pad(tokens, [(0, missing), *[(0, 0)] * (tokens.ndim - 1)]) if missing else tokens
    return padded.reshape(-1, size, *tokens.shape[1:])


def _chunk_length(tokens: int, vocab: int) -> int:
    """Tokens of a chunk: a divisor of their number that is near the most that fit, or an even share, padded."""
    elements = GPU_CHUNK_ELEMENTS if "NVIDIA" in current().device_kind else CHUNK_ELEMENTS
    most = max(1, elements // vocab)
    if tokens <= most:
        return tokens
    divisor = max(size for size in range(1, most + 1) if tokens % size == 0)
    # up to twice as many chunks cost little; a prime number of tokens would be so many chunks of one
    return divisor if 2 * divisor >= most else math.ceil(tokens / math.ceil(tokens / most))


def _chunk(x: Array, table: Array, targets: Array, weights: Array, *, vocab: int, z_loss: float, with_gradients: bool):
    tensor = current().axes("tensor")
    offset = jax.lax.axis_index(tensor) * table.shape[0]
    logits = jnp.einsum("ne,ve->nv", x, table, preferred_element_type=jnp.float32)
    entry = offset + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(entry < vocab, logits, -jnp.inf)
    hit = entry == targets[..., None]
    peak = jax.lax.pmax(logits.max(-1), tensor)
    sums = jnp.stack([jnp.exp(logits - peak[..., None]).sum(-1), jnp.where(hit, logits, 0.0).sum(-1)])
    normalizer, label = jax.lax.psum(sums, tensor)
    log_z = jnp.log(normalizer) + peak
    nll = jnp.sum(weights * (log_z - label))
    total = nll + z_loss * jnp.sum(weights * jnp.square(log_z))
    if not with_gradients:
        return total, nll, None, None
    pull = (1.0 + 2.0 * z_loss * log_z)[..., None] * jnp.exp(logits - log_z[..., None])
    dlogits = (weights[..., None] * (pull - hit)).astype(x.dtype)
    dx = jnp.einsum("nv,ve->ne", dlogits, table)
    dtable = jnp.einsum("nv,ne->ve", dlogits, x, preferred_element_type=jnp.float32)
    return total, nll, dx, dtable

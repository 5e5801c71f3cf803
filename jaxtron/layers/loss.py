"""Cross-entropy on a vocabulary-sharded head, a chunk of the sequence at a time."""

import functools
import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class LogitForm:
    """What becomes of a head's products before they are logits: `cap x tanh((scale x product + bias) / cap)`."""

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, products: Float[Array, "*rows V"], bias: Float[Array, "V"] | None) -> Float[Array, "*rows V"]:
        """The logits; as they are where nothing is asked for."""
        logits = products if self.scale == 1.0 else products * jnp.asarray(self.scale, products.dtype)
        logits = logits if bias is None else logits + bias.astype(logits.dtype)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def before_cap(self, gradient: Float[Array, "*rows V"], logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
        """The gradient of what the cap was put on, of that of the logits: also the bias's."""
        return gradient if self.soft_cap is None else gradient * (1.0 - jnp.square(logits / self.soft_cap))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 7))
def cross_entropy(
    x: Float[Array, "B S E"],
    table: Float[Array, "V E"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    vocab: int,
    z_loss: float,
    bias: Float[Array, "V"] | None = None,
    form: LogitForm = LogitForm(),
) -> Sums:
    """Weighted sums over the tokens of `nll + z_loss * log(Z)^2` (to differentiate) and of `nll` (to report).

    `x` is split over the sequence, `table` over its rows; rows from `vocab` on are padding and take no probability.
    Logits are the products of both in the form that is asked for, with a bias where there is one, split as the rows.
    Gradients are formed beside the loss, chunk by chunk, so that logits are computed once and never whole. The z-loss
    is PaLM's (2204.02311 sec. 5). Only the first output has a gradient.
    """
    return _run(x, Table(table, bias), targets, weights, form, vocab, z_loss, with_gradients=False)[:2]


def _forward(x, table, targets, weights, vocab, z_loss, bias, form):
    total, nll, *gradients = _run(x, Table(table, bias), targets, weights, form, vocab, z_loss, with_gradients=True)
    return (total, nll), gradients


def _backward(vocab, z_loss, form, gradients, cotangents):
    scale = cotangents[0]
    dx, head = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), tuple(gradients))
    return dx, head.rows, None, None, head.bias


cross_entropy.defvjp(_forward, _backward)


class Table(NamedTuple):
    """A head's parameters, or what is like them."""

    rows: Float[Array, "V E"]
    bias: Float[Array, "V"] | None


def _run(x, head: Table, targets, weights, form: LogitForm, vocab: int, z_loss: float, *, with_gradients: bool):
    tensor = current().axes("tensor")
    whole, rows, sequence = PartitionSpec(), PartitionSpec(tensor), PartitionSpec(None, tensor)

    def local(x: Array, head: Table, targets: Array, weights: Array):
        x = _gather_sequence(x)
        shape = x.shape
        # one axis of tokens: plain matrix products, and chunks without transposed copies
        tokens = [a.reshape(-1, *a.shape[2:]) for a in (x, targets, weights)]
        chunk = functools.partial(_chunk, form=form, vocab=vocab, z_loss=z_loss, with_gradients=with_gradients)
        total, nll, dx, dhead = _over_chunks(chunk, tokens[0], head, *tokens[1:])
        if dx is None:
            return total, nll
        return total, nll, _scatter_sequence(dx.reshape(shape)), dhead

    out_specs = (whole, whole, sequence, rows) if with_gradients else (whole, whole)
    in_specs = (sequence, rows, whole, whole)
    return over_tensor(local, in_specs, out_specs)(x, head, targets, weights)


def _gather_sequence(x: Array) -> Array:
    tensor = current().axes("tensor")
    return jax.lax.all_gather(x, tensor, axis=1, tiled=True) if current().size(tensor) > 1 else x


def _scatter_sequence(x: Array) -> Array:
    tensor = current().axes("tensor")
    return jax.lax.psum_scatter(x, tensor, scatter_dimension=1, tiled=True) if current().size(tensor) > 1 else x


def _over_chunks(chunk, x: Array, head: Table, targets: Array, weights: Array):
    """Sums and gradients over all chunks of tokens; gradients are None where `chunk` forms none."""
    tokens = x.shape[0]
    size = _chunk_length(tokens, head.rows.shape[0])

    def as_given(gradients: Table) -> Table:
        return jax.tree.map(lambda gradient, own: gradient.astype(own.dtype), gradients, head)

    if size == tokens:
        total, nll, dx, dhead = chunk(x, head, targets, weights)
        return total, nll, dx, None if dhead is None else as_given(dhead)
    split = [_split(a, size) for a in (x, targets, weights)]

    def body(dhead: Table, part):
        total, nll, dx, more = chunk(part[0], head, *part[1:])
        return dhead if more is None else jax.tree.map(operator.add, dhead, more), (total, nll, dx)

    zeros = jax.tree.map(lambda own: vary(jnp.zeros(own.shape, jnp.float32)), head)
    dhead, (total, nll, dx) = jax.lax.scan(body, zeros, split)
    dx = None if dx is None else dx.reshape(-1, *x.shape[1:])[:tokens]
    return total.sum(), nll.sum(), dx, as_given(dhead)


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


def _chunk(
    x: Array,
    head: Table,
    targets: Array,
    weights: Array,
    *,
    form: LogitForm,
    vocab: int,
    z_loss: float,
    with_gradients: bool,
):
    tensor, table = current().axes("tensor"), head.rows
    offset = jax.lax.axis_index(tensor) * table.shape[0]
    formed = form(jnp.einsum("ne,ve->nv", x, table, preferred_element_type=jnp.float32), head.bias)
    entry = offset + jax.lax.broadcasted_iota(jnp.int32, formed.shape, 1)
    logits = jnp.where(entry < vocab, formed, -jnp.inf)
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
    wide = form.before_cap(weights[..., None] * (pull - hit), formed)
    dbias = None if head.bias is None else wide.sum(0)
    dlogits = (wide if form.scale == 1.0 else wide * form.scale).astype(x.dtype)
    dx = jnp.einsum("nv,ve->ne", dlogits, table)
    dtable = jnp.einsum("nv,ne->ve", dlogits, x, preferred_element_type=jnp.float32)
    return total, nll, dx, Table(dtable, dbias)

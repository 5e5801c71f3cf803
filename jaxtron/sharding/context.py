"""How a sequence lies over `mesh.context`: every device has two pieces of it, so that causal work is even."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int


def starts(
    config: ContextConfig, size: int, rank: Int[Array, ""] | int, length: int
) -> tuple[Array | int, Array | int]:
    """First positions of a device's two pieces, each half of its `length` positions.

    Ring member g of n has the g-th and the g-th last of 2n blocks (zigzag), shared out among its inner neighbours.
    """
    inner, outer = config.groups(size)
    member, neighbour = rank // inner, rank % inner
    half = length // 2
    block = half * inner
    return member * block + neighbour * half, (2 * outer - 1 - member) * block + neighbour * half


def positions(config: ContextConfig, size: int, length: int) -> Int[Array, "S"]:
    """Positions in the whole sequence of the `length` that this device has, inside the manual region."""
    if size == 1:
        return jnp.arange(length)
    half = jnp.arange(length // 2)
    first, second = starts(config, size, jax.lax.axis_index(current().axes("context")), length)
    return jnp.concatenate([first + half, second + half])


def part(config: ContextConfig, size: int, x: Array, axis: int) -> Array:
    """This device's two pieces of `x`, whole along `axis`, inside the manual region."""
    if size == 1:
        return x
    length = x.shape[axis] // size
    first, second = starts(config, size, jax.lax.axis_index(current().axes("context")), length)
    pieces = [jax.lax.dynamic_slice_in_dim(x, start, length // 2, axis) for start in (first, second)]
    return jnp.concatenate(pieces, axis)


def pieces(x: Array) -> Array:
    """A device's part of sequences as its pieces, rows after rows: [B, S, ...] to [2B, S / 2, ...], first pieces first.

    As it is where a sequence is not split.
    """
    return x if current().parts("context") == 1 else jnp.concatenate(jnp.split(x, 2, 1))


def whole(x: Array) -> Array:
    """The inverse of `pieces`."""
    return x if current().parts("context") == 1 else jnp.concatenate(jnp.split(x, 2), 1)


def before(x: Array, width: int) -> Array:
    """The last `width` positions before each piece, zeros before the sequence: [2B, S, ...] to [2B, width, ...].

    One all-gather of the ends of all pieces.
    """
    if current().parts("context") == 1:
        return jnp.zeros_like(x, shape=(x.shape[0], width, *x.shape[2:]))
    return _moved(x[:, x.shape[1] - width :], 1)


def before_transposed(cotangent: Array, length: int) -> Array:
    """The transpose of `before`: zeros but for the last positions of each piece, [2B, width, ...] to [2B, S, ...]."""
    if current().parts("context") == 1:
        return jnp.zeros_like(cotangent, shape=(cotangent.shape[0], length, *cotangent.shape[2:]))
    given = _moved(cotangent, -1)
    return jnp.pad(given, ((0, 0), (length - given.shape[1], 0), *((0, 0),) * (given.ndim - 2)))


def entering(
    through: Float[Array, "B ..."],
    added: Float[Array, "B ..."],
    carry: Callable[[Array, Array, bool], Array],
    *,
    reverse: bool = False,
) -> Float[Array, "B ..."]:
    """The state that enters each piece, where a piece leaves `carry(through, state, reverse) + added` of a state; zeros
    enter the first.

    Where sequences are split. `reverse`: from the end, as gradients of states go. One all-gather of each, for states
    are small beside a sequence.
    """
    size = current().parts("context")
    factors, summands = _everywhere(through), _everywhere(added)
    state, found = jnp.zeros_like(summands[0]), {}
    for place in range(2 * size)[:: -1 if reverse else 1]:
        found[place] = state
        state = carry(factors[place], state, reverse) + summands[place]
    return _own(jnp.stack([found[place] for place in range(2 * size)]), 0)


def _moved(x: Array, by: int) -> Array:
    """Of each piece that of the one `by` places before it; zeros where there is none."""
    return _own(_everywhere(x), -by)


def _everywhere(x: Array) -> Array:
    """[2B, ...] of every device as [pieces, B, ...] in the sequence's order."""
    rules = current()
    size = rules.parts("context")
    gathered = jax.lax.all_gather(x.reshape(2, -1, *x.shape[1:]), rules.axes("context"), tiled=True)
    places = [place for rank in range(size) for place in starts(rules.context, size, rank, 2)]
    return gathered[np.argsort(places)]


def _own(x: Array, by: int) -> Array:
    """Of [pieces, B, ...] in order this device's two, moved by so many places: [2B, ...]; zeros beyond the ends."""
    rules = current()
    size = rules.parts("context")
    found = []
    for place in starts(rules.context, size, jax.lax.axis_index(rules.axes("context")), 2):
        at = place + by
        piece = jax.lax.dynamic_index_in_dim(x, jnp.clip(at, 0, 2 * size - 1), 0, keepdims=False)
        found.append(jnp.where((at >= 0) & (at < 2 * size), piece, jnp.zeros((), x.dtype)))
    return jnp.concatenate(found)

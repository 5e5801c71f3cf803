"""A sequence in chunks of equal length, and loops over them that hand on a state.

Memory is linear in the length: of many chunks, a block, one state is kept, and the backward makes the others again.
Results depend neither on how long chunks are nor on how many a block has.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float, PyTree

Tree = TypeVar("Tree")


def cut(arrays: Tree, most: int) -> Tree:
    """[B, S, ...] as [chunks, B, positions, ...], each, of so many positions at most; zeros behind the last."""

    def cut_one(array: Array) -> Array:
        length = array.shape[1]
        # of equal size, as near the largest as whole chunks allow, so that little is padding
        chunks = math.ceil(length / most)
        positions = math.ceil(length / chunks)
        array = jnp.pad(array, ((0, 0), (0, chunks * positions - length), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(array.reshape(array.shape[0], chunks, positions, *array.shape[2:]), 1, 0)

    return jax.tree.map(cut_one, arrays)


def joined(arrays: Tree, length: int) -> Tree:
    """The inverse of `cut` for the first `length` positions."""

    def join_one(array: Array) -> Array:
        array = jnp.moveaxis(array, 0, 1)
        return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]

    return jax.tree.map(join_one, arrays)


def forward_in_blocks(
    step: Callable[[Array, Tree], tuple[Array, Array]],
    initial: Float[Array, "B ..."],
    given: Tree,
    block: int,
    most: int,
) -> tuple[Float[Array, "B S ..."], Float[Array, "B ..."], Float[Array, "B blocks ..."]]:
    """Outputs, the final state, and the states that enter blocks.

    `step` makes of a state and a chunk the next state and outputs.
    """

    def run(state: Array, given: Tree) -> tuple[Array, tuple[Array, Array]]:
        after, y = jax.lax.scan(step, state, cut(given, most))
        return after, (joined(y, jax.tree.leaves(given)[0].shape[1]), state)

    initial, blocks = vary_alike((initial, cut(given, block)))
    final, (y, states) = jax.lax.scan(run, initial, blocks)
    return joined(y, jax.tree.leaves(given)[0].shape[1]), final, jnp.moveaxis(states, 0, 1)


def backward_in_blocks(
    after: Callable[[Array, Tree], Array],
    step: Callable[[PyTree, tuple[Array, Array, Tree]], tuple[PyTree, Tree]],
    carry: PyTree,
    states: Float[Array, "B blocks ..."],
    dy: Float[Array, "B S ..."],
    given: Tree,
    block: int,
    most: int,
) -> tuple[PyTree, Tree]:
    """The last carry, and gradients of what is given, chunks from the last to the first.

    `after` makes of a state and a chunk the next state; `step` makes of what is carried and of a chunk, with the state
    that enters it and its outputs' gradients, the next carry and the chunk's gradients.
    """

    def run(carry: PyTree, given: tuple[Array, Array, Tree]) -> tuple[PyTree, Tree]:
        state, dy, part = given
        chunks = cut(part, most)
        _, entered = jax.lax.scan(lambda state, chunk: (after(state, chunk), state), state, chunks)
        carry, made = jax.lax.scan(step, carry, (entered, cut(dy, most), chunks), reverse=True)
        return carry, joined(made, dy.shape[1])

    blocks = (jnp.moveaxis(states, 1, 0), cut(dy, block), cut(given, block))
    carry, blocks = vary_alike((carry, blocks))
    carry, made = jax.lax.scan(run, carry, blocks, reverse=True)
    return carry, joined(made, dy.shape[1])


class ChunkDecays(NamedTuple):
    """A chunk's decays in float32, of heads; of what a reset drops nothing is left."""

    logs: Float[Array, "B S H"]
    """Logarithm from the chunk's start up to and with each position."""
    from_start: Float[Array, "B S H"]
    """What is left at each position of the state that entered."""
    to_end: Float[Array, "B S H"]
    """What is left of each position at the end."""
    through: Float[Array, "B H"]
    """What is left of the state that entered at the end."""
    documents: Array | None
    """Number of resets up to and with each position [B, S]; none without resets."""

    @classmethod
    def of(cls, logs: Float[Array, "B S H"], resets: Bool[Array, "B S"] | None) -> "ChunkDecays":
        """Of the logarithms of each position's own."""
        logs = jnp.cumsum(logs, axis=1)
        from_start, to_end, left = jnp.exp(logs), jnp.exp(logs[:, -1:] - logs), jnp.exp(logs[:, -1])
        if resets is None:
            return cls(logs, from_start, to_end, left, None)
        documents = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
        first, last = documents == 0, documents == documents[:, -1:]
        return cls(
            logs,
            jnp.where(first[..., None], from_start, 0.0),
            jnp.where(last[..., None], to_end, 0.0),
            jnp.where(first[:, -1:], left, 0.0),
            documents,
        )

    @property
    def between(self) -> Float[Array, "B H S S"]:
        """What is left of position j at position i [B, H, i, j]: nothing of later ones and of other documents'."""
        logs = jnp.swapaxes(self.logs, 1, 2)
        place = jnp.arange(logs.shape[2])
        earlier = (place[:, None] > place)[None]
        if self.documents is not None:
            earlier = earlier & (self.documents[:, :, None] == self.documents[:, None])
        # masked before the exponential: of a later position it may be infinite, and its gradient no number; of itself
        # all is left of a position, where a gradient could only be what does not cancel of two sums
        other = jnp.where(jnp.eye(len(place), dtype=bool), 0.0, -jnp.inf)
        return jnp.exp(jnp.where(earlier[:, None], logs[..., :, None] - logs[..., None, :], other))

"""What XLA makes of steps and decays for the Mosaic kernels: small float32 arrays, logarithms of base 2."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxtron.kernels.ssd.mosaic_chunks import CHUNK
from jaxtron.typing import Array, Bool, Float

_LOG2_E = math.log2(math.e)


class Decays(NamedTuple):
    """By head and position, with sums that start anew in every chunk; of what a reset drops nothing is left.

    Positions are whole chunks.
    """

    steps: Float[Array, "B H S"]
    """dt."""
    sums: Float[Array, "B H S"]
    """Logarithm of the decay from the chunk's start up to and with each position."""
    shifted: Float[Array, "B H S"]
    """`sums` less the logarithm of dt: exp2(sums_i - shifted_j) is what is left at i of j, times dt_j."""
    from_start: Float[Array, "B H S"]
    """Logarithm of what is left at each position of the state that entered the chunk."""
    to_end: Float[Array, "B H S"]
    """Logarithm of dt times what is left of each position at the chunk's end."""
    through: Float[Array, "B H chunks"]
    """Logarithm of what is left at a chunk's end of the state that entered."""
    back: Array | None
    """Positions of its chunk that each sees in its document, itself and before, uint32 [B, S]; none: no resets."""
    ahead: Array | None
    """Positions of its chunk that see each in its document, itself and after."""

    @classmethod
    def of(cls, dt: Float[Array, "B S H"], A: Float[Array, " H"], resets: Bool[Array, "B S"] | None) -> "Decays":
        """Decays of whole chunks."""
        rows, length, heads = dt.shape
        steps = jnp.swapaxes(dt, 1, 2).reshape(rows, heads, -1, CHUNK)
        sums = jnp.cumsum(steps * (A * _LOG2_E)[:, None, None], axis=3)
        logs = jnp.log2(steps)
        from_start, to_end, left = sums, sums[..., -1:] - sums + logs, sums[..., -1]
        back = ahead = None
        if resets is not None:
            start, end = _documents(resets)
            place = jnp.arange(CHUNK, dtype=jnp.int32)
            from_start = jnp.where((start < 0)[:, None], from_start, -jnp.inf)
            to_end = jnp.where((end == CHUNK)[:, None], to_end, -jnp.inf)
            left = jnp.where((start[..., -1] < 0)[:, None], left, -jnp.inf)
            # a document that entered the chunk starts with it
            reach = place + 1 - jnp.maximum(start, 0), end - place
            back, ahead = (positions.reshape(rows, length).astype(jnp.uint32) for positions in reach)

        def flat(array: Array) -> Array:
            return array.reshape(rows, heads, length)

        return cls(flat(steps), flat(sums), flat(sums - logs), flat(from_start), flat(to_end), left, back, ahead)


def _documents(resets: Array) -> tuple[Array, Array]:
    """Of each position of a chunk [B, chunks, positions]: its document's first, -1 where it entered the chunk; and the
    next document's first, the number of positions where there is none."""
    cut = resets.reshape(resets.shape[0], -1, CHUNK)
    place = jnp.arange(CHUNK, dtype=jnp.int32)
    start = lax.cummax(jnp.where(cut, place, -1), axis=2)
    following = jnp.where(cut, place, CHUNK)[..., 1:]
    following = jnp.pad(following, ((0, 0), (0, 0), (0, 1)), constant_values=CHUNK)
    return start, lax.cummin(following, axis=2, reverse=True)

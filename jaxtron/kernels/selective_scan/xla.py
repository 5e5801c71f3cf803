"""The selective scan in plain JAX: a loop over chunks of the sequence, forward and backward. It runs anywhere.

Every channel and number of a state decays by itself, so there are no products of matrices: inside a chunk states are an
associative scan, and the gradients that they are asked for one from the end. Memory is linear in the length, with a
state for each of `KEPT` positions: the backward makes all others again, block by block and in it chunk by chunk.
Results do not depend on how long blocks and chunks are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.chunks import backward_in_blocks, cut, forward_in_blocks
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float

# positions for which one state is kept: of 128 numbers in float32 as many bytes as those of x in bfloat16
KEPT = 256
# numbers of all states of a row's chunk at most, of which a backward has several at once
_MOST = 2**21


def forward(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    C: Float[Array, "B S N"],
    D: Float[Array, " P"],
    initial: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Float[Array, "B S P"], Float[Array, "B N P"], Float[Array, "B chunks N P"]]:
    """y, the final state, and the states that enter blocks, in float32."""

    def chunk(state: Array, given: _Part) -> tuple[Array, Array]:
        _, states = _states(state, given, A)
        y = jnp.einsum("bsn,bsnp->bsp", given.C.astype(jnp.float32), states)
        y = y + D.astype(jnp.float32) * given.x.astype(jnp.float32)
        return states[:, -1], y.astype(x.dtype)

    return forward_in_blocks(chunk, initial, _Part(x, dt, B, C, resets), KEPT, most_positions(A))


def backward(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    C: Float[Array, "B S N"],
    D: Float[Array, " P"],
    states: Float[Array, "B chunks N P"],
    dy: Float[Array, "B S P"],
    dfinal: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Blocks from the last to the first: the states that enter its chunks again, then these from the last."""

    def chunk(carry: tuple[Array, Array, Array], given: tuple[Array, Array, _Part]) -> tuple[tuple, _Part]:
        return _chunk_gradients(A, D, carry, *given)

    def after(state: Array, part: _Part) -> Array:
        return _after(state, part, A)

    carry, part = (dfinal, jnp.zeros_like(A), jnp.zeros(D.shape, jnp.float32)), _Part(x, dt, B, C, resets)
    (dinitial, dA, dD), made = backward_in_blocks(after, chunk, carry, states, dy, part, KEPT, most_positions(A))
    return made.x, made.dt, dA, made.B, made.C, dD.astype(D.dtype), dinitial


def final_state(
    x: Float[Array, "B S P"],
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    B: Float[Array, "B S N"],
    initial: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B N P"]:
    """What chunks add to the state, without their outputs."""
    # nobody reads what C would read
    initial, chunks = vary_alike((initial, cut(_Part(x, dt, B, B, resets), most_positions(A))))
    return jax.lax.scan(lambda state, given: (_after(state, given, A), None), initial, chunks)[0]


def gradient_summary(
    dt: Float[Array, "B S P"],
    A: Float[Array, "P N"],
    C: Float[Array, "B S N"],
    dy: Float[Array, "B S P"],
    dfinal: Float[Array, "B N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B N P"]:
    """What chunks ask of the state that enters them, the last chunk first."""

    def chunk(dstate: Array, given: tuple[Array, Array, Array, Array | None]) -> tuple[Array, None]:
        dt, C, dy, resets = given
        from_start = jnp.exp(jnp.cumsum(dt, 1)[:, :, None] * A.T)
        if resets is not None:
            is_first = jnp.cumsum(resets, 1) == 0
            from_start = jnp.where(is_first[..., None, None], from_start, 0.0)
        asked = (C.astype(jnp.float32)[..., None] * dy.astype(jnp.float32)[:, :, None] * from_start).sum(1)
        return dstate * from_start[:, -1] + asked, None

    dfinal, chunks = vary_alike((dfinal, cut((dt, C, dy, resets), most_positions(A))))
    return jax.lax.scan(chunk, dfinal, chunks, reverse=True)[0]


class _Part(NamedTuple):
    """Inputs of a part of the sequence, or the gradients of them; of all parts they are stacked, parts first."""

    x: Array
    dt: Array
    B: Array
    C: Array
    resets: Array | None


def _decays(part: _Part, A: Array) -> Array:
    """What is left at each position of the state before it [B, S, N, P]."""
    left = jnp.exp(part.dt[:, :, None] * A.T)
    return left if part.resets is None else jnp.where(part.resets[..., None, None], 0.0, left)


def _written(part: _Part) -> Array:
    """What each position adds to the state [B, S, N, P]."""
    return part.B.astype(jnp.float32)[..., None] * (part.dt * part.x.astype(jnp.float32))[:, :, None]


def _states(state: Array, part: _Part, A: Array) -> tuple[Array, Array]:
    """What is left at each position of the state before it, and the state at it, of a chunk [B, S, N, P]."""
    left = _decays(part, A)
    through, added = jax.lax.associative_scan(_after_both, (left, _written(part)), axis=1)
    return left, through * state[:, None] + added


def _after_both(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two stretches of a sequence as one: what is left of a state, and what is added to it."""
    return first[0] * second[0], first[1] * second[0] + second[1]


def _after(state: Array, part: _Part, A: Array) -> Array:
    """The state after a chunk: a sum, for which no other state is needed."""
    # of the positions behind each, added up from the end: nothing cancels
    behind = jax.lax.cumsum(jnp.pad(part.dt[:, 1:], ((0, 0), (0, 1), (0, 0))), 1, reverse=True)
    to_end, through = jnp.exp(behind[:, :, None] * A.T), jnp.exp(part.dt.sum(1)[:, None] * A.T)
    if part.resets is not None:
        documents = jnp.cumsum(part.resets, 1)
        to_end = jnp.where((documents == documents[:, -1:])[..., None, None], to_end, 0.0)
        through = jnp.where((documents[:, -1] == 0)[:, None, None], through, 0.0)
    return state * through + (_written(part) * to_end).sum(1)


def _chunk_gradients(
    A: Array, D: Array, carry: tuple[Array, Array, Array], state: Array, dy: Array, part: _Part
) -> tuple[tuple[Array, Array, Array], _Part]:
    """From the gradient of the state after a chunk that of the one before it, and those of its inputs."""
    dstate, dA, dD = carry
    x, dt, B, C = (array.astype(jnp.float32) for array in part[:4])
    wide = dy.astype(jnp.float32)
    left, states = _states(state, part, A)
    before = jnp.concatenate([state[:, None], states[:, :-1]], 1)
    # of each state: what its own output asks, and what is left of it asks at the next position
    following = jnp.concatenate([left[:, 1:], jnp.ones_like(left[:, :1])], 1)
    pair = following, C[..., None] * wide[:, :, None]
    through, asked = jax.lax.associative_scan(_after_both, pair, axis=1, reverse=True)
    dstates = through * dstate[:, None] + asked
    by_exponent = dstates * before * left
    by_written = jnp.einsum("bsnp,bsn->bsp", dstates, B)
    skip = D.astype(jnp.float32)
    made = _Part(
        (dt * by_written + skip * wide).astype(part.x.dtype),
        x * by_written + jnp.einsum("bsnp,pn->bsp", by_exponent, A),
        jnp.einsum("bsnp,bsp->bsn", dstates, dt * x).astype(part.B.dtype),
        jnp.einsum("bsnp,bsp->bsn", states, wide).astype(part.C.dtype),
        None,
    )
    dA = dA + jnp.einsum("bsnp,bsp->pn", by_exponent, dt)
    return (dstates[:, 0] * left[:, 0], dA, dD + jnp.einsum("bsp,bsp->p", x, wide)), made


def most_positions(A: Array) -> int:
    """Positions of a chunk at most, by how many numbers the states of a position are."""
    return min(64, max(8, _MOST // max(A.size, 1)))

"""State-space duality in plain JAX: a loop over chunks of the sequence, forward and backward. It runs anywhere.

Inside a chunk it is attention without a softmax, whose weights decay with distance; chunks hand on the state. Memory is
linear in the length: the backward keeps the states that enter chunks and makes everything else again, chunk by chunk.
Results do not depend on how long chunks are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.chunks import ChunkDecays, cut, joined
from jaxtron.kernels.ssd.spec import Operand
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float


def unsupported_reason(x: Operand, B: Operand, device_kind: str) -> str | None:
    """None: it computes on any device, arrays of any size and type."""
    return None


def forward(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, " H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], Float[Array, "B chunks H N P"]]:
    """y, the final state, and the states that enter the chunks, in float32."""

    def body(state: Array, chunk: _Chunk) -> tuple[Array, tuple[Array, Array]]:
        y, after = _outputs(A, D, state, chunk)
        return after, (y, state)

    most = most_positions(B.shape[3], x.shape[3])
    initial, chunks = vary_alike((initial, cut(_Chunk(x, dt, B, C, resets), most)))
    final, (y, states) = jax.lax.scan(body, initial, chunks)
    return joined(y, x.shape[1]), final, jnp.moveaxis(states, 0, 1)


def backward(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, " H"],
    states: Float[Array, "B chunks H N P"],
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Each chunk's own derivative, the last chunk first."""

    def body(carry: tuple[Array, Array, Array], given: tuple[Array, Array, _Chunk]) -> tuple[tuple, _Chunk]:
        dstate, dA, dD = carry
        state, dy, chunk = given

        def outputs(A: Array, D: Array, state: Array, x: Array, dt: Array, B: Array, C: Array) -> tuple[Array, Array]:
            return _outputs(A, D, state, _Chunk(x, dt, B, C, chunk.resets))

        _, pull = jax.vjp(outputs, A, D, state, chunk.x, chunk.dt, chunk.B, chunk.C)
        here_A, here_D, dstate, dx, ddt, dB, dC = pull((dy, dstate))
        return (dstate, dA + here_A, dD + here_D), _Chunk(dx, ddt, dB, dC, None)

    carry = (dfinal, jnp.zeros_like(A), jnp.zeros_like(D))
    most = most_positions(B.shape[3], x.shape[3])
    given = (jnp.moveaxis(states, 1, 0), cut(dy, most), cut(_Chunk(x, dt, B, C, resets), most))
    carry, given = vary_alike((carry, given))
    (dinitial, dA, dD), by_chunk = jax.lax.scan(body, carry, given, reverse=True)
    dx, ddt, dB, dC = (joined(part, x.shape[1]) for part in by_chunk[:4])
    return dx, ddt, dA, dB, dC, dD, dinitial


def final_state(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """What chunks add to the state, without their outputs."""

    def body(state: Array, given: tuple[Array, Array, Array, Array | None]) -> tuple[Array, None]:
        x, dt, B, resets = given
        return _after(state, x, dt, B, ChunkDecays.of(dt * A, resets)), None

    most = most_positions(B.shape[3], x.shape[3])
    initial, chunks = vary_alike((initial, cut((x, dt, B, resets), most)))
    return jax.lax.scan(body, initial, chunks)[0]


def gradient_summary(
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    C: Float[Array, "B S G N"],
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """What chunks ask of the state that enters them, the last chunk first."""

    def body(dstate: Array, given: tuple[Array, Array, Array, Array | None]) -> tuple[Array, None]:
        dt, C, dy, resets = given
        decays = ChunkDecays.of(dt * A, resets)
        weighted = _grouped(dy.astype(jnp.float32) * decays.from_start[..., None], C.shape[2])
        asked = jnp.einsum("bsgn,bsghp->bghnp", C.astype(jnp.float32), weighted)
        return dstate * decays.through[..., None, None] + asked.reshape(dstate.shape), None

    most = most_positions(C.shape[3], dy.shape[3])
    dfinal, chunks = vary_alike((dfinal, cut((dt, C, dy, resets), most)))
    return jax.lax.scan(body, dfinal, chunks, reverse=True)[0]


class _Chunk(NamedTuple):
    """What a chunk is computed from, or the gradients of it; of all chunks they are stacked, chunks first."""

    x: Array
    dt: Array
    B: Array
    C: Array
    resets: Array | None


def _outputs(A: Array, D: Array, state: Array, chunk: _Chunk) -> tuple[Array, Array]:
    """y of a chunk, and the state after it."""
    x, dt, B, C = (array.astype(jnp.float32) for array in chunk[:4])
    decays, groups = ChunkDecays.of(dt * A, chunk.resets), B.shape[2]
    between = decays.between.reshape(x.shape[0], groups, -1, x.shape[1], x.shape[1])
    entered = state.reshape(x.shape[0], groups, -1, *state.shape[2:])
    weights = jnp.einsum("bign,bjgn->bgij", C, B)[:, :, None] * between
    y = jnp.einsum("bghij,bjghp->bighp", weights, _grouped(x * dt[..., None], groups))
    y = y + jnp.einsum("bign,bghnp->bighp", C, entered) * _grouped(decays.from_start, groups)[..., None]
    y = y.reshape(x.shape) + D.astype(jnp.float32)[:, None] * x
    return y.astype(chunk.x.dtype), _after(state, x, dt, B, decays)


def _after(state: Array, x: Array, dt: Array, B: Array, decays: ChunkDecays) -> Array:
    """The state after a chunk."""
    weighted = _grouped(x.astype(jnp.float32) * (decays.to_end * dt)[..., None], B.shape[2])
    added = jnp.einsum("bsgn,bsghp->bghnp", B.astype(jnp.float32), weighted)
    return state * decays.through[..., None, None] + added.reshape(state.shape)


def _grouped(array: Array, groups: int) -> Array:
    """[B, S, H, ...] as [B, S, G, H / G, ...]."""
    return array.reshape(*array.shape[:2], groups, -1, *array.shape[3:])


def most_positions(size: int, width: int) -> int:
    """Positions of a chunk at most, by a state's size N x P: pairs in a chunk cost as states of chunks do."""
    return 64 if size * width <= 4096 else 128

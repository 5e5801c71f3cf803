"""The gated delta rule in plain JAX: a loop over chunks of the sequence, forward and backward. It runs anywhere.

What a chunk's positions write depends on what earlier ones wrote: a unit lower triangular system (the WY form of the
product of 1 - beta k k^T, 2412.06464, section 3.3), solved by substitution, for powers of its matrix cancel where keys
are alike. With what is written as values a chunk is state-space duality. Of each block of chunks one state is kept; the
backward makes all else again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.chunks import ChunkDecays, backward_in_blocks, cut, forward_in_blocks
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Bool, Float

# positions of a chunk, whose triangular system is solved position by position, and of a block
CHUNK, KEPT = 64, 256
# of the system's products: what is rounded there is multiplied on the way through it
_EXACT = jax.lax.Precision.HIGHEST


def forward(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], Float[Array, "B chunks H N P"]]:
    """Outputs, the final state, and the states that enter blocks, in float32."""
    return forward_in_blocks(_outputs, initial, _Part(q, k, v, g, beta, resets), KEPT, CHUNK)


def backward(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    states: Float[Array, "B chunks H N P"],
    do: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Each chunk's own derivative, the last chunk first."""

    def after(state: Array, part: _Part) -> Array:
        return _outputs(state, part)[0]

    def step(dstate: Array, given: tuple[Array, Array, _Part]) -> tuple[Array, _Part]:
        state, do, part = given

        def outputs(state: Array, *inputs: Array) -> tuple[Array, Array]:
            return _outputs(state, _Part(*inputs, resets=part.resets))

        dstate, *made = jax.vjp(outputs, state, *part[:5])[1]((dstate, do))
        return dstate, _Part(*made, resets=None)

    part = _Part(q, k, v, g, beta, resets)
    dinitial, made = backward_in_blocks(after, step, dfinal, states, do, part, KEPT, CHUNK)
    return *made[:5], dinitial


def final_state(
    k: Float[Array, "B S G N"],
    v: Float[Array, "B S H P"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """What chunks add to the state, without their outputs."""
    # nobody reads what queries would read
    initial, chunks = vary_alike((initial, cut(_Part(k, k, v, g, beta, resets), CHUNK)))
    return jax.lax.scan(lambda state, part: (_outputs(state, part)[0], None), initial, chunks)[0]


def gradient_summary(
    q: Float[Array, "B S G N"],
    k: Float[Array, "B S G N"],
    g: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    do: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
) -> Float[Array, "B H N P"]:
    """What chunks ask of the state that enters them, the last chunk first: whatever it and values are."""

    def step(dstate: Array, given: tuple[Array, _Part]) -> tuple[Array, None]:
        do, part = given
        (dstate,) = jax.vjp(lambda state: _outputs(state, part), jnp.zeros_like(dstate))[1]((dstate, do))
        return dstate, None

    part = _Part(q, k, jnp.zeros_like(do), g, beta, resets)
    dfinal, chunks = vary_alike((dfinal, cut((do, part), CHUNK)))
    return jax.lax.scan(step, dfinal, chunks, reverse=True)[0]


class _Part(NamedTuple):
    """Inputs of a part of the sequence, or the gradients of them; of all parts they are stacked, parts first."""

    q: Array
    k: Array
    v: Array
    g: Array
    beta: Array
    resets: Array | None


def _outputs(state: Array, part: _Part) -> tuple[Array, Array]:
    """The state after a chunk, and its outputs."""
    q, k, v = (array.astype(jnp.float32) for array in part[:3])
    decays, heads, groups = ChunkDecays.of(part.g, part.resets), v.shape[2], k.shape[2]
    between, from_start = decays.between, jnp.swapaxes(decays.from_start, 1, 2)[..., None]
    beta = jnp.swapaxes(part.beta, 1, 2)[..., None]
    entered = state.reshape(state.shape[0], groups, -1, *state.shape[2:])

    def by_head(array: Array) -> Array:
        """[B, G, i, j] as [B, H, i, j]."""
        return jnp.repeat(array, heads // groups, axis=1)

    def read(keys: Array) -> Array:
        """Of the state that entered, at each position [B, H, i, P]."""
        found = jnp.einsum("bign,bgrnp->bgrip", keys, entered, precision=_EXACT)
        return from_start * found.reshape(state.shape[0], heads, *found.shape[3:])

    place = jnp.arange(q.shape[1])
    met = by_head(jnp.einsum("bign,bjgn->bgij", k, k, precision=_EXACT))
    system = jnp.where(place[:, None] > place, beta * met * between, 0.0)
    wanted = beta * (jnp.swapaxes(v, 1, 2) - read(k))
    written = jax.lax.linalg.triangular_solve(system, wanted, left_side=True, lower=True, unit_diagonal=True)
    weights = by_head(jnp.einsum("bign,bjgn->bgij", q, k)) * between
    o = jnp.einsum("bhij,bhjp->bihp", weights, written) + jnp.swapaxes(read(q), 1, 2)
    kept = (jnp.swapaxes(decays.to_end, 1, 2)[..., None] * written).reshape(*entered.shape[:3], *written.shape[2:])
    added = jnp.einsum("bjgn,bgrjp->bgrnp", k, kept).reshape(state.shape)
    return state * decays.through[..., None, None] + added, o.astype(part.v.dtype)

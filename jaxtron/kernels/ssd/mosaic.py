"""`mosaic`: state-space duality for Hopper GPUs (sm_90a), forward and backward, in Pallas on Mosaic GPU.

Forward is one kernel that walks along the chunks of a head. Backward is three: gradients of the states from chunk to
chunk, then each chunk by its inputs and by its outputs, both of which read products of B and C that were made once for
all heads of a group. None adds to memory that another block adds to: the bits are the same every time. Where rows and
heads are too few to fill a GPU, a sequence is several that run at once, from states that a summary of each has told.

Heads are of 64 columns: a wider one is several with the same dt, A and D, what is missing is filled with zeros.
Under `vmap` and inside `jax.shard_map` over rows and heads the kernels run as they are; elsewhere the partitioner would
gather their inputs.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxtron.kernels.mosaic import Target, not_hopper, processors
from jaxtron.kernels.ssd import mosaic_forward
from jaxtron.kernels.ssd.mosaic_chunks import CHUNK, STATE_SIZES, WIDTH
from jaxtron.kernels.ssd.mosaic_decays import Decays
from jaxtron.kernels.ssd.mosaic_inputs import by_inputs
from jaxtron.kernels.ssd.mosaic_march import march
from jaxtron.kernels.ssd.mosaic_outputs import by_outputs
from jaxtron.kernels.ssd.spec import Operand, through
from jaxtron.typing import Array, Bool, Float

# time of a walk whose states a summary told first, in times of one alone: it reads half of the operands again
_SUMMARIZED = 1.5
# a block's first and last chunk have nothing to overlap with
_LEAST_CHUNKS = 4


def unsupported_reason(x: Operand, B: Operand, device_kind: str) -> str | None:
    """Why these kernels cannot compute arrays of such sizes and types on such devices, or None if they can."""
    if (reason := not_hopper(device_kind)) is not None:
        return reason
    if jnp.dtype(x.dtype) != jnp.bfloat16:
        return f"its kernels take bfloat16, not {x.dtype}"
    if B.shape[3] not in STATE_SIZES:
        return f"its kernels take states of {' and '.join(map(str, STATE_SIZES))}, not {B.shape[3]}"
    if 0 in (*x.shape, *B.shape):
        return "its kernels take no empty arrays"
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
    *,
    interpret: Any = None,
    pieces: int | None = None,
) -> tuple[Float[Array, "B S H P"], Float[Array, "B H N P"], Float[Array, "B chunks heads N 64"]]:
    """y, the final state, and the states that enter the chunks in the type of x.

    `interpret` takes `InterpretGPUParams` to run on a CPU; as many `pieces` of a sequence run at once, none: as many as
    use a GPU best.
    """
    heads, count = _Heads.of(x), pieces or pieces_of(x)
    given = (heads.narrow(x), heads.each(dt), B, C, resets)
    A, D, entering = heads.each(A), heads.each(D), heads.narrow_state(initial)
    wide_x, dt, B, C, resets = _cut(count, *given)
    final = None
    if count > 1:
        nothing = jnp.zeros((wide_x.shape[0], *entering.shape[1:]), jnp.float32)
        added = final_state(wide_x, dt, A, B, nothing, resets, interpret=interpret)
        entering, final = _states_between(through(dt, A, resets), added, entering, reverse=False)
    decays, target = Decays.of(dt, A, resets), Target(interpret)
    y, states, last = mosaic_forward.forward(wide_x, B, C, D.astype(jnp.float32), entering, decays, target)
    final = last if final is None else final
    states = states.reshape(x.shape[0], -1, *states.shape[2:])
    return heads.wide(_joined(y, x.shape)), heads.wide_state(final), states


def final_state(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    initial: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    *,
    interpret: Any = None,
) -> Float[Array, "B H N P"]:
    """States from chunk to chunk, of which none is kept."""
    heads = _Heads.of(x)
    values, steps, keys, cuts = _cut(1, heads.narrow(x), heads.each(dt), B, resets)
    decays, state = Decays.of(steps, heads.each(A), cuts), heads.narrow_state(initial)
    last, _, _ = march(values, keys, decays.to_end, decays.through, state, Target(interpret), reverse=False)
    return heads.wide_state(last)


def gradient_summary(
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    C: Float[Array, "B S G N"],
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    *,
    interpret: Any = None,
) -> Float[Array, "B H N P"]:
    """Gradients of states from chunk to chunk, of which none is kept."""
    heads = _Heads.of(dy)
    values, steps, keys, cuts = _cut(1, heads.narrow(dy), heads.each(dt), C, resets)
    decays, state = Decays.of(steps, heads.each(A), cuts), heads.narrow_state(dfinal)
    first, _, _ = march(values, keys, decays.from_start, decays.through, state, Target(interpret), reverse=True)
    return heads.wide_state(first)


def backward(
    x: Float[Array, "B S H P"],
    dt: Float[Array, "B S H"],
    A: Float[Array, " H"],
    B: Float[Array, "B S G N"],
    C: Float[Array, "B S G N"],
    D: Float[Array, " H"],
    states: Float[Array, "B chunks heads N 64"],
    dy: Float[Array, "B S H P"],
    dfinal: Float[Array, "B H N P"],
    resets: Bool[Array, "B S"] | None,
    *,
    interpret: Any = None,
    pieces: int | None = None,
    parts: int | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of x, dt, A, B, C, D and the initial state.

    `interpret` and `pieces` are as in `forward`; so many blocks as `parts` share out the heads that read one B and C,
    none: as many as use a GPU best.
    """
    heads, count = _Heads.of(x), pieces or pieces_of(x)
    values, out, steps, leaving = heads.narrow(x), heads.narrow(dy), heads.each(dt), heads.narrow_state(dfinal)
    wide_A, wide_D = heads.each(A), heads.each(D)
    values, out, steps, keys, queries, cuts = _cut(count, values, out, steps, B, C, resets)
    states = states.reshape(values.shape[0], -1, *states.shape[2:])
    dinitial = None
    if count > 1:
        nothing = jnp.zeros((values.shape[0], *leaving.shape[1:]), jnp.float32)
        asked = gradient_summary(steps, wide_A, queries, out, nothing, cuts, interpret=interpret)
        leaving, dinitial = _states_between(through(steps, wide_A, cuts), asked, leaving, reverse=True)
    decays, target = Decays.of(steps, wide_A, cuts), Target(interpret)
    weights = decays.from_start, decays.through
    first, dstates, products = march(out, queries, *weights, leaving, target, reverse=True, others=states)
    assert dstates is not None and products is not None, "it was given states"
    parts = parts or parts_of(values, keys)
    scores = _scores(keys, queries)
    wide_D = wide_D.astype(jnp.float32)
    inputs = by_inputs(values, out, keys, queries, wide_D, dstates, jnp.swapaxes(scores, 3, 4), decays, parts, target)
    dC, before = by_outputs(values, out, keys, queries, states, scores, decays, parts, target)
    ddt, dA = _step_gradients(inputs.inside, inputs.behind, before, products, decays, wide_A, cuts)
    return (
        heads.wide(_joined(inputs.dx, x.shape)),
        heads.total(_joined(jnp.swapaxes(ddt, 1, 2), dt.shape)),
        heads.total(dA),
        _groups_of(inputs.dB, keys, B.shape),
        _groups_of(dC, keys, C.shape),
        heads.total(inputs.skipped.sum((0, 2))).astype(D.dtype),
        heads.wide_state(first if dinitial is None else dinitial),
    )


def _scores(B: Array, C: Array) -> Array:
    """Products of C and B in chunks [B, chunks, G, outputs, inputs], once for all heads of a group.

    They are rounded once: what a pair has in the sums of its input and of its output must be the same, for it cancels.
    """
    rows, length, groups, size = B.shape
    cut_C, cut_B = (array.reshape(rows, length // CHUNK, CHUNK, groups, size) for array in (C, B))
    return jnp.einsum("bcign,bcjgn->bcgij", cut_C, cut_B, preferred_element_type=jnp.float32).astype(B.dtype)


def _step_gradients(
    inside: Array, behind: Array, before: Array, products: Array, decays: Decays, A: Array, resets: Array | None
) -> tuple[Array, Array]:
    """Gradients of dt [B, H, S] and A, from the kernels' sums by head and position, and by head and chunk.

    All are float32 sums of the same products, which cancel.
    """
    rows, heads, length = before.shape
    sums = (before - inside - behind).reshape(rows, heads, -1, CHUNK)
    at_end = behind.reshape(sums.shape).sum(-1) + jnp.swapaxes(products.sum(-1), 1, 2)
    sums = sums.at[..., -1].add(at_end)
    # a logarithm of a decay is in the sums of all positions after it in the chunk
    dlogs = lax.cumsum(sums, axis=3, reverse=True).reshape(rows, heads, length)
    if resets is not None:
        dlogs = jnp.where(resets[:, None], 0.0, dlogs)
    # a step of 0 is padding, or has no derivative where it is made
    steps = decays.steps
    added = jnp.where(steps > 0, (inside + behind) / jnp.where(steps > 0, steps, 1.0), 0.0)
    return added + dlogs * A[:, None], jnp.einsum("bhs,bhs->h", dlogs, steps)


@dataclass(frozen=True)
class _Heads:
    """Heads of any width as heads of 64 columns."""

    heads: int
    width: int

    @classmethod
    def of(cls, x: Operand) -> "_Heads":
        return cls(x.shape[2], x.shape[3])

    @property
    def times(self) -> int:
        """Heads of 64 columns that one is."""
        return math.ceil(self.width / WIDTH)

    def narrow(self, x: Array) -> Array:
        """[B, S, H, P] as [B, S, heads, 64]."""
        return self._filled(x).reshape(*x.shape[:2], -1, WIDTH)

    def wide(self, x: Array) -> Array:
        """The inverse."""
        return x.reshape(*x.shape[:2], self.heads, -1)[..., : self.width]

    def narrow_state(self, state: Array) -> Array:
        """[B, H, N, P] as [B, heads, N, 64]."""
        rows, heads, size, _ = state.shape
        apart = self._filled(state).reshape(rows, heads, size, self.times, WIDTH)
        return jnp.swapaxes(apart, 2, 3).reshape(rows, -1, size, WIDTH)

    def wide_state(self, state: Array) -> Array:
        """The inverse."""
        rows, _, size, _ = state.shape
        apart = state.reshape(rows, self.heads, self.times, size, WIDTH)
        return jnp.swapaxes(apart, 2, 3).reshape(rows, self.heads, size, -1)[..., : self.width]

    def each(self, array: Array) -> Array:
        """[..., H] as [..., heads]."""
        return jnp.repeat(array, self.times, axis=-1) if self.times > 1 else array

    def total(self, array: Array) -> Array:
        """Its transpose."""
        return array.reshape(*array.shape[:-1], self.heads, -1).sum(-1) if self.times > 1 else array

    def _filled(self, array: Array) -> Array:
        missing = self.times * WIDTH - self.width
        return jnp.pad(array, (*((0, 0),) * (array.ndim - 1), (0, missing))) if missing else array


def pieces_of(x: Operand) -> int:
    """Pieces of a sequence that run at once, so that walks along them take least time in all."""
    walks = x.shape[0] * x.shape[2] * _Heads.of(x).times
    chunks = math.ceil(x.shape[1] / CHUNK)

    def time(pieces: int) -> float:
        return math.ceil(walks * pieces / processors()) / pieces * (_SUMMARIZED if pieces > 1 else 1.0)

    counts = [count for count in range(1, chunks // _LEAST_CHUNKS + 1) if chunks % count == 0]
    return min(counts, key=time, default=1)


def parts_of(x: Operand, B: Operand) -> int:
    """Blocks that share out a group's heads of 64: so many that a GPU has two rounds of blocks at least."""
    each = x.shape[2] // B.shape[2]
    blocks = x.shape[0] * B.shape[2] * x.shape[1] // CHUNK
    counts = [count for count in range(1, each + 1) if each % count == 0]
    return next((count for count in counts if count * blocks >= 2 * processors()), each)


def _states_between(left: Array, added: Array, first: Array, *, reverse: bool) -> tuple[Array, Array]:
    """The states that enter the pieces of each row [B * pieces, H, N, P], and the one after the last."""

    def step(state: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        left, added = piece
        return left[..., None, None] * state + added, state

    apart = tuple(jnp.moveaxis(a.reshape(first.shape[0], -1, *a.shape[1:]), 1, 0) for a in (left, added))
    last, states = lax.scan(step, first, apart, reverse=reverse)
    return jnp.moveaxis(states, 0, 1).reshape(added.shape), last


def _cut(pieces: int, *arrays: Array | None) -> tuple[Any, ...]:
    """[B, S, ...] as [B * pieces, S / pieces, ...] of whole chunks; steps of 0 behind the last leave the state."""

    def cut(array: Array | None) -> Array | None:
        if array is None:
            return None
        missing = -array.shape[1] % (pieces * CHUNK)
        if missing:
            array = jnp.pad(array, ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2)))
        return array.reshape(array.shape[0] * pieces, -1, *array.shape[2:])

    return tuple(cut(array) for array in arrays)


def _joined(array: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_cut`, of as many rows and positions as `shape` has."""
    return array.reshape(shape[0], -1, *array.shape[2:])[:, : shape[1]]


def _groups_of(array: Array, like: Array, shape: tuple[int, ...]) -> Array:
    """[B, S, G * parts, N] summed to `shape`, cut like `like`."""
    parts = array.reshape(*like.shape[:3], -1, like.shape[3])
    total = parts[..., 0, :] if parts.shape[3] == 1 else parts.astype(jnp.float32).sum(3).astype(like.dtype)
    return _joined(total, shape)

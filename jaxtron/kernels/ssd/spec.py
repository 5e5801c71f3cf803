"""State-space duality (Mamba-2, 2405.21060, section 6): what it computes, and what it is given.

A head has a state h [N, P], which decays and is added to at every position:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T
    y_t = h_t^T C_t + D x_t

x [B, S, H, P]; dt [B, S, H] float32, not below 0; A [H] float32, below 0; D [H]; B and C [B, S, G, N], of which head h
reads group h // (H / G); states [B, H, N, P] float32. `resets` [B, S] is true where the state before a position is
dropped: at a document's first (at a sequence's first only who cut it knows). A position with dt 0 leaves the state as
it is; such are put behind a length that is no whole number of chunks.
"""

import jax
import jax.numpy as jnp

from jaxtron.config import UserError
from jaxtron.typing import Array, Bool, Float

TYPES = ("bfloat16", "float16", "float32")
# x or B, or what stands for their shape and type
Operand = Array | jax.ShapeDtypeStruct


def through(
    dt: Float[Array, "B S H"], A: Float[Array, " H"], resets: Bool[Array, "B S"] | None = None
) -> Float[Array, "B H"]:
    """What is left at the end of the state that entered: the final state is this times it, plus `final_state` of 0."""
    left = jnp.exp(jnp.einsum("bsh,h->bh", dt.astype(jnp.float32), A.astype(jnp.float32)))
    return left if resets is None else jnp.where(resets.any(1)[:, None], 0.0, left)


def check(
    x: Operand,
    dt: Operand,
    A: Operand,
    B: Operand,
    C: Operand,
    *,
    D: Operand | None = None,
    state: Operand | None = None,
    resets: Operand | None = None,
) -> None:
    """Raises `UserError` where sizes and types do not fit together; `x` may be the gradient of y."""
    if x.ndim != 4 or B.ndim != 4:
        raise UserError(f"state-space duality of x {x.shape} and B {B.shape}: they must be [B, S, H, P], [B, S, G, N]")
    (rows, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    if not length or not groups or heads % groups:
        raise UserError(
            f"state-space duality of {length:,} positions, {heads} heads and {groups} groups: there must be a position "
            "at least, and heads must be a multiple of groups"
        )
    wanted = {
        "dt": (dt, (rows, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (rows, length, groups, size)),
        "C": (C, (rows, length, groups, size)),
        "D": (D, (heads,)),
        "state": (state, (rows, heads, size, width)),
        "resets": (resets, (rows, length)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise UserError(f"state-space duality of x {x.shape}: {name} is {array.shape} and must be {shape}")
    if not x.dtype == B.dtype == C.dtype or jnp.dtype(x.dtype).name not in TYPES:
        raise UserError(
            f"state-space duality of {x.dtype} x, {B.dtype} B, {C.dtype} C: they must be of one type of "
            f"{', '.join(TYPES)}"
        )
    if not dt.dtype == A.dtype == jnp.float32:
        raise UserError(f"state-space duality with {dt.dtype} dt and {A.dtype} A: both must be float32")

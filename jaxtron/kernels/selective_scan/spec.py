"""The selective scan (Mamba, 2312.00752, section 3.3): what it computes, and what it is given.

A channel has a state h [N], which decays, each number at its own rate, and is added to at every position:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t
    y_t = C_t . h_t + D x_t

x [B, S, P]; dt [B, S, P] float32, not below 0; A [P, N] float32, below 0; D [P]; B and C [B, S, N], which all channels
read; states [B, N, P] float32. `resets` [B, S] is true where the state before a position is dropped: at a document's
first (at a sequence's first only who cut it knows). A position with dt 0 leaves the state as it is; such are put behind
a length that is no whole number of chunks.
"""

import jax
import jax.numpy as jnp

from jaxtron.config import UserError
from jaxtron.typing import Array, Bool, Float

TYPES = ("bfloat16", "float16", "float32")
# an array, or what stands for its shape and type
Operand = Array | jax.ShapeDtypeStruct


def through(
    dt: Float[Array, "B S P"], A: Float[Array, "P N"], resets: Bool[Array, "B S"] | None = None
) -> Float[Array, "B N P"]:
    """What is left at the end of the state that entered: the final state is this times it, plus `final_state` of 0."""
    left = jnp.exp(dt.astype(jnp.float32).sum(1)[:, None] * A.astype(jnp.float32).T)
    return left if resets is None else jnp.where(resets.any(1)[:, None, None], 0.0, left)


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
    if x.ndim != 3 or A.ndim != 2:
        raise UserError(f"a selective scan of x {x.shape} and A {A.shape}: they must be [B, S, P], [P, N]")
    (rows, length, channels), size = x.shape, A.shape[1]
    if not length:
        raise UserError(f"a selective scan of x {x.shape}: there must be a position at least")
    wanted = {
        "dt": (dt, (rows, length, channels)),
        "A": (A, (channels, size)),
        "B": (B, (rows, length, size)),
        "C": (C, (rows, length, size)),
        "D": (D, (channels,)),
        "state": (state, (rows, size, channels)),
        "resets": (resets, (rows, length)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise UserError(f"a selective scan of x {x.shape}: {name} is {array.shape} and must be {shape}")
    if not x.dtype == B.dtype == C.dtype or jnp.dtype(x.dtype).name not in TYPES:
        raise UserError(
            f"a selective scan of {x.dtype} x, {B.dtype} B, {C.dtype} C: they must be of one type of {', '.join(TYPES)}"
        )
    if not dt.dtype == A.dtype == jnp.float32:
        raise UserError(f"a selective scan with {dt.dtype} dt and {A.dtype} A: both must be float32")

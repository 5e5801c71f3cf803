"""The gated delta rule (2412.06464): what it computes, and what it is given.

A head has a state S [N, P], a memory of values by key. It decays, and what it has at a position's key is replaced by
the position's value, to a part of beta:

    S_t = a_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    a_t = exp(g_t)
    o_t = S_t^T q_t

q and k [B, S, G, N], of which head h reads group h // (H / G); v [B, S, H, P]; g and beta [B, S, H] float32, g not
above 0; states [B, H, N, P] float32. Keys are to have length 1 (or none): with beta in 0 to 1 a state then cannot grow.
`resets` [B, S] is true where the state before a position is dropped: at a document's first (at a sequence's first only
who cut it knows). A position with g, k and beta 0 leaves the state as it is; such are put behind a length that is no
whole number of chunks.

What a sequence does to the state that enters it is a matrix [N, N] of each head (`gated_delta.through`), and a summand.
"""

import jax
import jax.numpy as jnp

from jaxtron.config import UserError
from jaxtron.typing import Array

TYPES = ("bfloat16", "float16", "float32")
# an array, or what stands for its shape and type
Operand = Array | jax.ShapeDtypeStruct


def check(
    k: Operand,
    v: Operand,
    g: Operand,
    beta: Operand,
    *,
    q: Operand | None = None,
    state: Operand | None = None,
    resets: Operand | None = None,
) -> None:
    """Raises `UserError` where sizes and types do not fit together; `v` may be the gradient of the output."""
    if k.ndim != 4 or v.ndim != 4:
        raise UserError(f"a gated delta rule of k {k.shape} and v {v.shape}: they must be [B, S, G, N], [B, S, H, P]")
    (rows, length, heads, width), (groups, size) = v.shape, k.shape[2:]
    if not length or not groups or heads % groups:
        raise UserError(
            f"a gated delta rule of {length:,} positions, {heads} heads and {groups} groups: there must be a position "
            "at least, and heads must be a multiple of groups"
        )
    wanted = {
        "k": (k, (rows, length, groups, size)),
        "q": (q, (rows, length, groups, size)),
        "g": (g, (rows, length, heads)),
        "beta": (beta, (rows, length, heads)),
        "state": (state, (rows, heads, size, width)),
        "resets": (resets, (rows, length)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise UserError(f"a gated delta rule of v {v.shape}: {name} is {array.shape} and must be {shape}")
    types = {array.dtype for array in (q, k, v) if array is not None}
    if len(types) > 1 or jnp.dtype(v.dtype).name not in TYPES:
        raise UserError(
            f"a gated delta rule of {k.dtype} k, {v.dtype} v: q, k and v must be of one type of {', '.join(TYPES)}"
        )
    if not g.dtype == beta.dtype == jnp.float32:
        raise UserError(f"a gated delta rule with {g.dtype} g and {beta.dtype} beta: both must be float32")

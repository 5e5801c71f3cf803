"""Matrices whose numbers depend on column - row alone: a line of numbers instead, one for each diagonal.

Nothing here gathers or scatters: lines are padded and cut, and a matrix is its line over and over in rows that are one
number longer, so that each row begins one number earlier. Transposes are JAX's own, of the same kind.
"""

import jax
import jax.numpy as jnp

from jaxtron.typing import Array, Float, Int


def line(table: Float[Array, "*heads N"], first: Int[Array, ""] | int, length: int) -> Float[Array, "*heads L"]:
    """Numbers of the distances first, first + 1 ...; a table has those of distances around 0, which is at N // 2.

    What is farther than the table's ends has what they have. `first` may be traced.
    """
    heads, known = table.shape[:-1], table.shape[-1]
    # not `jnp.pad` by its edges, which no Explicit axis goes through
    before, after = (jnp.broadcast_to(end, (*heads, length)) for end in (table[..., :1], table[..., -1:]))
    padded = jnp.concatenate([before, table, after], -1)
    start = jnp.clip(first + known // 2 + length, 0, known + length)
    return jax.lax.dynamic_slice_in_dim(padded, start, length, padded.ndim - 1)


def matrix(line: Float[Array, "*heads L"], rows: int) -> Float[Array, "*heads S T"]:
    """The matrix with the line's first number in its lower left corner and the last in its upper right one."""
    heads, length = line.shape[:-1], line.shape[-1]
    copies = jnp.broadcast_to(line[..., None, :], (*heads, rows, length)).reshape(*heads, rows * length)
    copies = jnp.pad(copies, (*((0, 0) for _ in heads), (0, rows))).reshape(*heads, rows, length + 1)
    return copies[..., ::-1, : length - rows + 1]


def diagonals(matrix: Float[Array, "*heads S T"]) -> Float[Array, "*heads L"]:
    """Sums along the diagonals, the lower left corner's first: the transpose of `matrix`."""
    heads, (rows, columns) = matrix.shape[:-2], matrix.shape[-2:]
    length = rows + columns - 1
    whole = [(0, 0)] * len(heads)
    padded = jnp.pad(matrix[..., ::-1, :], (*whole, (0, 0), (0, rows)))
    copies = padded.reshape(*heads, rows * (length + 1))[..., : rows * length]
    return copies.reshape(*heads, rows, length).sum(-2)

"""Numbers to e4m3, and the powers of two by which tiles of 128 along a contraction are divided, or blocks."""

import jax
import jax.numpy as jnp

from jaxtron.kernels.block_products.spec import BLOCK, Rounded
from jaxtron.typing import Array, DTypeLike, Float

E4M3 = jnp.float8_e4m3fn
# of a tensor of zeros, or of numbers so small that two scales multiplied would be none of float32
LEAST_SCALE = 2.0**-60
# of a float32, as an integer: all bits of its fraction, and those of its exponent
_FRACTION, _EXPONENT = 0x007FFFFF, 0x7F800000


def power_of_two(peak: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """The smallest float32 power of two by which numbers up to `peak` are divided to be in the range of `dtype`.

    What is not finite makes the product not finite.
    """
    wanted = jnp.maximum(peak.astype(jnp.float32) / float(jnp.finfo(dtype).max), LEAST_SCALE)
    bits = jax.lax.bitcast_convert_type(wanted, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + _FRACTION) & _EXPONENT, jnp.float32)


def divided(x: Float[Array, "..."], scale: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """`x / scale` in `dtype`."""
    return (x * (1.0 / scale).astype(x.dtype)).astype(dtype)


def by_rows(x: Float[Array, "B S K"]) -> tuple[Float[Array, "B S K"], Float[Array, "blocks B S"]]:
    """Values and scales of tiles of a row's next 128 numbers, for products that contract the last dimension."""
    tiles = _in_blocks(x, 2)
    scale = power_of_two(jnp.max(jnp.abs(tiles), axis=3), E4M3)
    values = divided(tiles, scale[..., None], E4M3).reshape(*x.shape[:2], -1)
    return values[..., : x.shape[2]], jnp.moveaxis(scale, 2, 0)


def by_columns(
    x: Float[Array, "B S C"], runs: int
) -> tuple[Float[Array, "runs B C R"], Float[Array, "runs B blocks C"]]:
    """Of tiles of a column's next 128 numbers, for products that contract rows: `runs` equal parts of the positions,
    each as long as a multiple of 128 by zeros behind it."""
    rows, run, columns = x.shape[0], x.shape[1] // runs, x.shape[2]
    tiles = _in_blocks(x.reshape(rows, runs, run, columns), 2)
    scale = power_of_two(jnp.max(jnp.abs(tiles), axis=3), E4M3)
    values = divided(tiles, scale[:, :, :, None], E4M3).reshape(rows, runs, -1, columns)
    return jnp.transpose(values, (1, 0, 3, 2)), jnp.swapaxes(scale, 0, 1)


def block_scales(kernel: Float[Array, "I O"]) -> Float[Array, "down across"]:
    """Of blocks of 128 x 128."""
    blocks = _in_blocks(_in_blocks(kernel, 0), 2)
    return power_of_two(jnp.max(jnp.abs(blocks), axis=(1, 3)), E4M3)


def by_blocks(kernel: Float[Array, "I O"], scales: Float[Array, "down across"]) -> Float[Array, "I O"]:
    """Values of blocks of 128 x 128 that have these scales."""
    return divided(kernel, spread(spread(scales, 0, kernel.shape[0]), 1, kernel.shape[1]), E4M3)


def spread(scales: Float[Array, "..."], dim: int, size: int) -> Float[Array, "..."]:
    """One for each of `size` numbers along `dim`, of which 128 have one together."""
    before, after = scales.shape[: dim + 1], scales.shape[dim + 1 :]
    each = jnp.broadcast_to(jnp.expand_dims(scales, dim + 1), (*before, BLOCK, *after))
    return jax.lax.slice_in_dim(each.reshape(*before[:-1], -1, *after), 0, size, axis=dim)


def whole(values: Float[Array, "M R"], scales: Float[Array, "blocks tiles"]) -> Rounded:
    """One part alone."""
    return Rounded(values[None], scales[None])


def _in_blocks(x: Array, dim: int) -> Array:
    """With `dim` as two, the second of 128: zeros behind what there is."""
    missing = -x.shape[dim] % BLOCK
    if missing:
        x = jnp.pad(x, [(0, missing if dim == padded else 0) for padded in range(x.ndim)])
    return x.reshape(*x.shape[:dim], x.shape[dim] // BLOCK, BLOCK, *x.shape[dim + 1 :])

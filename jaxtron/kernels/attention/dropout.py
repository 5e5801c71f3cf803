"""Which of attention's probabilities are dropped: a row's head has two seeds, which decide with two positions.

So all implementations drop the same ones, in forward and backward, whatever their tiles are and whichever device has
which rows, heads and pieces of the sequence; no mask is kept or sent.

The numbers are those of Philox2x32-7 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; seven rounds are
the fewest that pass their tests). One call makes 64 bits, 16 for each of four probabilities: of queries q and q + 8 and
keys k and k + 8. These four are in the registers of one thread in a tile of a tensor-core product and in its transpose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.kernels.dropout import threshold
from jaxtron.typing import Array, Bool, Int, UInt32

MULTIPLIER, WEYL = 0xD256D193, 0x9E3779B9
ROUNDS = 7
WORD = 0xFFFFFFFF
# between the two queries, and the two keys, that share a call
APART = 8
# tiles of which a thread draws alone start at multiples of it
ALIGNMENT = 2 * APART


def philox(counter: tuple[Any, Any], keys: Sequence[Any], product: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Two words of random bits of a counter of two, with a round for each key.

    `product` gives the upper and the lower word of a word times `MULTIPLIER`.
    """
    first, second = counter
    for key in keys:
        high, low = product(first)
        first, second = high ^ key ^ second, low
    return first, second


def survives(
    queries: Int[Array, "..."],
    keys: Int[Array, "..."],
    seeds: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    rate: float,
) -> Bool[Array, "..."]:
    """True where a probability stays, of positions and seeds that broadcast against each other."""
    queries, keys = queries.astype(jnp.uint32), keys.astype(jnp.uint32)
    others = jnp.uint32(WORD - APART)
    first, second = philox(
        (queries & others, (keys & others) ^ seeds[1]),
        [seeds[0] + jnp.uint32(number * WEYL & WORD) for number in range(ROUNDS)],
        lambda word: (_upper_product(word), word * jnp.uint32(MULTIPLIER)),
    )
    word = jnp.where((queries & APART) != 0, second, first)
    # its upper 16 bits count: what is below them decides nothing
    word = jnp.where((keys & APART) != 0, word, word << 16)
    return word >= jnp.uint32(threshold(rate) << 16)


def _upper_product(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The upper word of `word * MULTIPLIER`, by halves: XLA compiles no `lax.mulhi` on a mesh."""
    low, high = word & 0xFFFF, word >> 16
    of_low, of_high = (jnp.uint32(half) for half in (MULTIPLIER & 0xFFFF, MULTIPLIER >> 16))
    one = high * of_low + (low * of_low >> 16)
    other = low * of_high + (one & 0xFFFF)
    return high * of_high + (one >> 16) + (other >> 16)


def kept(spec: AttentionSpec, num_queries: int, num_keys: int) -> Bool[Array, "B H S T"] | None:
    """`survives` of all pairs; none where nothing is dropped."""
    if spec.dropout_seeds is None or not spec.dropout_rate:
        return None
    queries = spec.q_offset + jnp.arange(num_queries)[:, None]
    keys = spec.kv_offset + jnp.arange(num_keys)
    first, second = (spec.dropout_seeds[:, :, word, None, None] for word in range(2))
    return survives(queries, keys, (first, second), spec.dropout_rate)

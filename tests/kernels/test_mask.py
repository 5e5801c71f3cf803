"""Who attends to whom, counted."""

import jax.numpy as jnp
import pytest

from jaxtron.kernels.attention.mask import Mask, allowed, most_pairs

MASKS = [
    Mask(),
    Mask(causal=False),
    Mask(window=3),
    Mask(window=3, causal=False),
    Mask(q_offset=4),
    Mask(q_offset=-3),
    Mask(window=5, q_offset=2, kv_offset=6),
    Mask(window=100),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5), (1, 1)])
def test_pairs_are_those_that_attend(mask: Mask, queries: int, keys: int):
    assert most_pairs(mask, queries, keys) == int(allowed(mask, queries, keys).sum())


def test_where_offsets_are_unknown_all_may_attend():
    assert most_pairs(Mask(q_offset=jnp.int32(0)), 5, 7) == 35
    assert most_pairs(Mask(q_offset=jnp.int32(0), window=3), 5, 7) == 15

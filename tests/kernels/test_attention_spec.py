"""Who attends to whom, counted."""

import jax.numpy as jnp
import pytest

from jaxtron.kernels.attention.spec import AttentionSpec, allowed, most_pairs

SPECS = [
    AttentionSpec(),
    AttentionSpec(causal=False),
    AttentionSpec(window=3),
    AttentionSpec(window=3, causal=False),
    AttentionSpec(q_offset=4),
    AttentionSpec(q_offset=-3),
    AttentionSpec(window=5, q_offset=2, kv_offset=6),
    AttentionSpec(window=100),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5), (1, 1)])
def test_pairs_are_those_that_attend(spec: AttentionSpec, queries: int, keys: int):
    assert most_pairs(spec, queries, keys) == int(allowed(spec, queries, keys).sum())


def test_where_offsets_are_unknown_all_may_attend():
    assert most_pairs(AttentionSpec(q_offset=jnp.int32(0)), 5, 7) == 35
    assert most_pairs(AttentionSpec(q_offset=jnp.int32(0), window=3), 5, 7) == 15

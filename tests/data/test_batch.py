"""Batches whose fields say themselves what they are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from jaxtron.data.batch import (
    SEQUENCE,
    TokenBatch,
    make_batch,
    map_batch,
    normalizers,
    row_bytes,
    rows,
    stack_samples,
    weight,
)


@dataclass(frozen=True)
class Pair:
    """Sequences with a label each, two losses."""

    tokens: Any = rows(SEQUENCE)
    weights: Any = weight(SEQUENCE, normalizes="tokens")
    is_swapped: Any = rows(dtype=bool)
    order_weights: Any = weight(normalizes="pairs")
    types: Any = rows(SEQUENCE, dtype=np.int8, optional=True)


def sample(number: int, **more: Any) -> Pair:
    ones = np.ones(3, np.float32)
    return Pair(np.full(3, number, np.int32), ones, np.bool_(number % 2), np.float32(number), **more)


def test_samples_become_rows_of_the_same_class():
    batch = stack_samples([sample(0), sample(1)])
    assert batch.tokens.tolist() == [[0, 0, 0], [1, 1, 1]] and batch.is_swapped.tolist() == [False, True]
    assert batch.order_weights.tolist() == [0, 1] and batch.types is None
    assert normalizers(Pair) == ("tokens", "pairs")


def test_a_source_gives_a_field_of_all_samples_in_its_type():
    with_types = sample(1, types=np.zeros(3, np.int8))
    assert stack_samples([with_types, with_types]).types.shape == (2, 3)
    with pytest.raises(AssertionError, match="types of all its samples or of none"):
        stack_samples([sample(0), with_types])
    with pytest.raises(AssertionError, match="types of all its samples or of none"):
        stack_samples([with_types, sample(0)])
    with pytest.raises(AssertionError, match="types is int64, but declared int8"):
        stack_samples([sample(0, types=np.zeros(3, np.int64))])


def test_shapes_and_bytes_follow_from_the_declaration():
    batch = make_batch(Pair, 5, {SEQUENCE: 7}, {"types"}, lambda shape, dtype: (shape, dtype.name))
    assert batch.tokens == ((5, 7), "int32") and batch.is_swapped == ((5,), "bool") and batch.types == ((5, 7), "int8")
    assert row_bytes(Pair, {SEQUENCE: 7}) == 7 * (4 + 4) + 1 + 4
    assert row_bytes(TokenBatch, {SEQUENCE: 10}) == 120
    assert row_bytes(TokenBatch, {SEQUENCE: 10}, {"positions", "segments"}) == 200


def test_fields_are_mapped_by_what_they_are():
    axes = map_batch(lambda field, array: field.axes, sample(0))
    assert (axes.tokens, axes.is_swapped, axes.types) == ((SEQUENCE,), (), None)
